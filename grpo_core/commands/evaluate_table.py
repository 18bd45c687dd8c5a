"""The table of the `evaluate` command."""

from __future__ import annotations

from typing import Any

from grpo_core.counts import quantify


def format_table(result: dict[str, Any]) -> str:
    """Return the result as text: a line per figure, a column per policy, 95 % intervals in parentheses."""
    columns = [name for name in ("base", "policy", "difference") if name in result]
    width = max(map(len, result["policy"])) + 2
    lines = [*format_head(result), "", " " * width + "".join(f"{name:<28}" for name in columns).rstrip()]
    for name in result["policy"]:
        cells = [format_figure(name, result[column][name], signed=column == "difference") for column in columns]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    if "paired" in result:
        paired = result["paired"]
        lines += [
            "",
            f"greedy answers: {quantify(paired['won'], 'problem')} won and {paired['lost']} lost against the base "
            "model, "
            f"McNemar's p = {paired['p']:.2g}",
        ]
    return "\n".join(lines)


def format_problems(data: dict[str, Any]) -> str:
    """Return the number of the problems and where they come from."""
    return f"{quantify(data['problems'], 'problem')} of {data['path']} ({data['split']})"


def format_head(result: dict[str, Any]) -> list[str]:
    """Return lines that name the weights, the problems and the settings of the samples."""
    data, sampling = result["data"], result["sampling"]
    lines = [f"{result['weights']}" + (", compared with its base model" if "base" in result else "")]
    lines.append(format_problems(data))
    if data.get("cut"):
        cut = quantify(data["cut"], "of them is", "of them are")
        lines[-1] += f"; {cut} cut on the left, to data.max_prompt_tokens"
    if data["left_out"]:
        left_out = quantify(data["left_out"], "more is", "more are")
        lines[-1] += f"; {left_out} left out, because the prompt has too many tokens (data.max_prompt_tokens)"
    if sampling["samples"]:
        cuts = "".join(f", {name} {sampling[name]:g}" for name in ("top_k", "top_p", "min_p") if name in sampling)
        lines[-1] += (
            f"; {quantify(sampling['samples'], 'sample')} per problem at temperature {sampling['temperature']:g}{cuts}"
        )
    return lines


def format_figure(name: str, figure: dict[str, float], *, signed: bool = False) -> str:
    """Return the mean and interval of a figure, in per cent if it is a share. `signed` is for differences."""
    is_share = not name.startswith(("reward", "turns", "length"))
    scale, number_format = (100, ".1f") if is_share else (1, ".3g")
    sign, unit = "+" if signed else "", " %" if is_share and not signed else ""
    mean, low, high = (f"{figure[key] * scale:{sign}{number_format}}" for key in ("value", "ci_low", "ci_high"))
    return f"{mean}{unit} ({low} to {high})"
