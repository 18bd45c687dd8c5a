// The tokens of a dumped completion, coloured by advantage, ratio or probability.

const COLOURINGS = {
  advantage: {
    title: "Advantage",
    what: "Intended change: the update raises the probability of blue tokens and lowers that of orange ones; a stronger colour " +
      "means a larger advantage. " +
      "A dotted underline marks tokens whose probability changed the other way.",
    look: ({ advantage }) => (advantage ? `${advantage > 0 ? "up" : "down"}${Math.min(4, Math.ceil(Math.abs(advantage) * 2))}` : ""),
    legend: [
      ["down4", "below −1.5"], ["down3", "to −1"], ["down2", "to −0.5"], ["down1", "below 0"], ["", "0"],
      ["up1", "to 0.5"], ["up2", "to 1"], ["up3", "to 1.5"], ["up4", "above"],
    ],
  },
  ratio: {
    title: "Ratio",
    what: "Actual change: the token's probability after the update divided by the one before.",
    look: ({ ratio }) => {
      if (ratio === null || ratio <= 0) return "";
      const strength = [1.005, 1.05, 1.2, 1.5].filter((edge) => Math.max(ratio, 1 / ratio) >= edge).length;
      return strength ? `${ratio > 1 ? "up" : "down"}${strength}` : "";
    },
    legend: [
      ["down4", "below 0.67"], ["down3", "to 0.83"], ["down2", "to 0.95"], ["down1", "to 0.995"], ["", "about 1"],
      ["up1", "from 1.005"], ["up2", "from 1.05"], ["up3", "from 1.2"], ["up4", "from 1.5"],
    ],
  },
  probability: {
    title: "Probability",
    what: "The token's probability before the update. Tokens without colour were nearly certain.",
    look: ({ logprob }) => {
      const rare = logprob === null ? 0 : [0.9, 0.5, 0.1, 0.01].filter((edge) => Math.exp(logprob) < edge).length;
      return rare ? `rare${rare}` : "";
    },
    legend: [["", "above 90 %"], ["rare1", "50 to 90 %"], ["rare2", "10 to 50 %"], ["rare3", "1 to 10 %"], ["rare4", "below 1 %"]],
  },
};
let colouring = "advantage"; // what was chosen last holds for the next completion too

// `dump` is {tokens, logprobs, ratio}; `whole` is the advantage of the whole completion. Completions of several turns have
// `turns`, the number of each token's turn, -1 for a given token; `advantages` are there if those of the tokens differ.
function tokenView(dump, whole) {
  const facts = dump.tokens.map((text, i) => ({
    text, logprob: dump.logprobs[i] ?? null, ratio: dump.ratio[i] ?? null, advantage: dump.advantages ? dump.advantages[i] ?? 0 : whole,
    turn: dump.turns ? dump.turns[i] : null,
  }));
  const text = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens; select one with the arrow keys" });
  const legend = el("p", { class: "token-legend" }), what = el("p", { class: "what" });
  const said = el("p", { class: "token-said", "aria-live": "polite" }, "Point at a token, tap it, or use the arrow keys.");
  const spans = facts.map((fact) => el("span", {}, visible(fact.text).replace(/\n/g, "\u23ce\n") || "\u2205"));
  text.append(...spans);
  let at = -1;

  function paint() {
    const { look, what: words, legend: steps } = COLOURINGS[colouring];
    facts.forEach((fact, i) => {
      const against = colouring === "advantage" && fact.ratio !== null && fact.advantage * (fact.ratio - 1) < -1e-4;
      const coloured = fact.turn === -1 ? "given" : `${look(fact)}${against ? " against" : ""}`;
      spans[i].className = `${coloured}${i === at ? " at" : ""}`;
    });
    what.textContent = words;
    const given = dump.turns ? [["given", "given by the environment"]] : [];
    legend.replaceChildren(...[...steps, ...given].map(([name, label]) => el("span", {}, el("i", { class: name }), label)));
    for (const [name, button] of buttons) button.setAttribute("aria-pressed", String(name === colouring));
  }

  function say(i) {
    if (i < 0 || i >= facts.length) return;
    if (at >= 0) spans[at].classList.remove("at");
    at = i;
    spans[at].classList.add("at");
    const { logprob, ratio, advantage, turn } = facts[i];
    said.replaceChildren(
      el("b", {}, `Token ${i + 1} of ${facts.length}`), ` ${JSON.stringify(visible(facts[i].text))}: `,
      turn === -1 ? "given by the environment, not trained" :
        `${turn === null ? "" : `turn ${turn + 1}, `}probability ${logprob === null ? NONE : percent(Math.exp(logprob))}, ` +
        `log-prob ${inShort(logprob)}, ratio ${inShort(ratio, 5)}, advantage ${inShort(advantage)}`
    );
  }

  const buttons = Object.entries(COLOURINGS).map(([name, { title }]) => {
    const choose = () => {
      colouring = name;
      paint();
    };
    return [name, el("button", { type: "button", click: choose }, title)];
  });
  const tell = (event) => say(spans.indexOf(event.target));
  text.addEventListener("pointerover", tell);
  text.addEventListener("click", tell);
  text.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    say(Math.min(facts.length - 1, Math.max(0, at + by)));
  });
  paint();
  const choice = el("div", { class: "choice", role: "group", "aria-label": "Colour of tokens" }, "Coloured by ", ...buttons.map(([, b]) => b));
  return el("div", { class: "token-view" }, choice, what, legend, text, said);
}
