// The text of a completion of several turns: what the policy drew in colour, what the environment gave set apart.

const CALL = /<tool_call>|<\|python_tag\|>/;
const CALL_START = 60; // characters of a folded call, or of its answer, that can be read

// `turns` are [end drawn, end given, reward, ended by], places in the text, and with calls of tools also their number, that
// of errors, and the beginning of the answer.
function turnView(text, turns, query) {
  const root = el("div", { class: "text turns", tabindex: "0", role: "group", "aria-label": "Turns" });
  let start = 0;
  turns.forEach(([drawnEnd, givenEnd, reward, endedBy, calls, errors, answer], i) => {
    const drawn = text.slice(start, drawnEnd), given = text.slice(drawnEnd, givenEnd);
    start = givenEnd;
    const notes = [`turn ${i + 1}`];
    if (endedBy === "turn_limit") notes.push("cut at the turn's limit");
    if (endedBy === "limit") notes.push("cut at the completion's limit");
    if (reward !== null) notes.push(`reward ${signed(reward)}`);
    const look = `drawn c${i % 8}`;
    root.append(el("span", { class: `turn c${i % 8}` }, notes.join(", ")));
    if (!calls) root.append(el("span", { class: look }, ...marked(drawn, query)), ...givenPart(given, query));
    else {
      const at = Math.max(0, drawn.search(CALL)); // a call in another form is the whole turn
      const isMarked = query && (drawn.slice(at) + given).toLowerCase().includes(query.toLowerCase());
      root.append(el("span", { class: look }, ...marked(drawn.slice(0, at), query)));
      root.append(
        el("details", { class: "call", open: Boolean(isMarked) },
          el("summary", {}, `${counted(calls, "tool call")}${errors ? `, ${counted(errors, "error")}` : ""}: `, el("code", {}, shortened(drawn.slice(at))), ...(answer ? [" \u2192 ", el("code", {}, shortened(answer))] : [])),
          el("span", { class: look }, ...marked(drawn.slice(at), query)), ...givenPart(given, query))
      );
    }
  });
  root.append(...marked(text.slice(start), query));
  return root;
}

// Text of one line stands in the line, as an answer that completes an expression; more is a block.
function givenPart(given, query) {
  if (!given) return [];
  return [el("span", { class: given.trim().includes("\n") ? "given block" : "given" }, ...marked(given, query))];
}

// The beginning of a text on one line, without the special tokens that open and close calls.
function shortened(text) {
  const line = visible(text.replace(/<\|?\/?[\w ]+\|?>/g, " ").replace(/\s+/g, " ").trim());
  return line.length > CALL_START ? line.slice(0, CALL_START) + "\u2026" : line;
}
