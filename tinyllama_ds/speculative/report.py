"""What `draft-bench` measured, as tables and a picture."""

from typing import TYPE_CHECKING, Any

from tinyllama_ds.speculative.acceptance import acceptance_for
from tinyllama_ds.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOAL = 1.2  # a speed-up for which a draft is worth its memory
_HEAD = ("", "length", "acceptance", "accepted/round", "tokens/s", "speed-up", "predicted", "break-even", "same text")


def report_text(result: dict[str, Any]) -> str:
    """The tables, what their columns mean, and the best draft."""
    positions = max(len(draft["acceptance_by_position"]) for draft in result["drafts"])
    by_position = [
        [draft["draft"], *(f"{share:.2f}" for share in draft["acceptance_by_position"])] for draft in result["drafts"]
    ]
    for row in by_position:
        row += [""] * (positions + 1 - len(row))
    numbers = [str(position) for position in range(1, positions + 1)]
    return "\n\n".join(
        [
            text_table(_rows(result), _HEAD),
            "\n".join(
                [
                    "acceptance: accepted / (accepted + rejected) drafted tokens; break-even: the acceptance for a"
                    " speed-up of 1 by the measured time of a round",
                    "predicted: (1 - a^(g+1)) / ((1 - a) (g c + 1)) by Leviathan et al. 2022, of acceptance a, draft"
                    " length g and cost ratio c",
                ]
            ),
            "acceptance by position, after the ones before were accepted\n"
            + text_table(by_position, ["position", *numbers]),
            advice(result),
        ]
    )


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["target alone", "", "", "", f"{result['tokens_per_second']:.1f}", "1.00", "", "", ""]]
    for draft in result["drafts"]:
        rows.append([draft["draft"], f"cost ratio {draft['cost_ratio']:.3f}"])
        for row in draft["draft_lengths"]:
            even, same = row["acceptance_to_break_even"], row["same_as_target"]
            rows.append(
                [
                    *("", str(row["draft_length"]), f"{row['acceptance']:.3f}", f"{row['accepted_per_round']:.2f}"),
                    *(f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}", f"{row['predicted_speedup']:.2f}"),
                    "none" if even is None else f"{even:.3f}",
                    "sampled" if same is None else f"{same}/{result['prompts']}",
                ]
            )
    return rows


def advice(result: dict[str, Any]) -> str:
    """The best draft and length; where it is below the goal, the acceptance that this would take."""
    draft = max(result["drafts"], key=lambda draft: draft["speedup"])
    row = next(row for row in draft["draft_lengths"] if row["draft_length"] == draft["best_draft_length"])
    best = f"best: {draft['draft']} with --draft-length {row['draft_length']}: {row['speedup']:.2f} x the target alone"
    if row["speedup"] >= GOAL:
        return best
    needed = acceptance_for(GOAL, row["draft_length"], row["round_cost"])
    if needed is None:
        return f"{best}; a round of this length takes too long for {GOAL} x with any acceptance"
    return f"{best}; {GOAL} x would take an acceptance of {needed:.2f}, and it is {row['acceptance']:.2f}"


def figure_of(result: dict[str, Any]) -> "Figure":
    """Acceptance by position, and speed-up by draft length as measured and predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    positions, lengths = figure.subplots(1, 2)
    for number, draft in enumerate(result["drafts"]):
        color, shares, rows = f"C{number}", draft["acceptance_by_position"], draft["draft_lengths"]
        drafted = [row["draft_length"] for row in rows]
        positions.plot(range(1, len(shares) + 1), shares, "o-", color=color, label=draft["draft"])
        lengths.plot(drafted, [row["speedup"] for row in rows], "o-", color=color, label=draft["draft"])
        lengths.plot(drafted, [row["predicted_speedup"] for row in rows], "--", color=color)
    positions.set(xlabel="position of the drafted token", ylabel="acceptance, after the ones before", ylim=(0, 1.02))
    lengths.axhline(1, color="gray", linewidth=0.8)
    lengths.set(xlabel="draft length", ylabel="speed-up over the target alone (dashed: predicted)")
    lengths.set_ylim(bottom=0)
    for axis in (positions, lengths):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{result['target']}: {result['prompts']} prompts, {result['max_new_tokens']} new tokens, temperature"
        f" {result['temperature']:g}, {result['device']}, {result['dtype']}"
    )
    return figure
