"""Ship a training checkpoint: its mean weights become the package's nano.safetensors, its figures the model card.

    python -m training.ship --checkpoint RUN/checkpoint.pt

Refuses weights that do not beat the trivial controls, or the shipped ones, on the held-out scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.evaluate import SHIPPED, evaluate, held_out, load_model, print_table, real_windows
from training.generate import DEFAULT_DATA, NUM_FRAMES, NUM_FRAMES_LONG
from training.train import CHECKPOINT, DEFAULT_OUT

CARD = SHIPPED.with_name("MODEL_CARD.md")
TEMPLATE = Path(__file__).with_name("model_card.md.in")
Table = dict[str, dict[str, float]]


def beats_controls(table: Table) -> list[str]:
    """Reasons why ``nano`` does not beat the trivial controls; empty: it does.

    The straight line is not asked for here: in windows as short and even as these it knows the path's shape beforehand.
    """
    nano, reasons = table["nano"], []
    for name, control, limit in (
        ("rotation", "identity", table["identity"]["rotation"]),
        ("direction", "chance", 90.0),
        ("ate", "identity", table["identity"]["ate"]),
        ("absrel", "constant depth", table["constant depth"]["absrel"]),
    ):
        if not nano[name] < limit:
            reasons.append(f"{name} {nano[name]:.3f} is not below {control} {limit:.3f}")
    return reasons


def beats_shipped(new: Table, old: Table) -> bool:
    """The new weights are better in the geometric mean of the four median errors of ``nano``."""
    ratio = [new["nano"][name] / old["nano"][name] for name in ("rotation", "direction", "ate", "absrel")]
    return float(torch.tensor(ratio).log().mean()) < 0


def markdown(table: Table) -> str:
    """Rows of a markdown table, medians with means in brackets."""
    lines = ["| method | rotation, deg | direction, deg | ATE / path | AbsRel |", "|---|---|---|---|---|"]
    for method, row in table.items():
        cells = [
            f"{row[name]:.{digits}f} ({row[name + '_mean']:.{digits}f})" if name in row else "-"
            for name, digits in (("rotation", 2), ("direction", 1), ("ate", 3), ("absrel", 3))
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sequences(state: dict) -> int:
    """Sequences in the data sets of this run and of those before; a set that two runs used counts twice."""
    return int(state["sequences"]) + int(state["earlier"].get("sequences", 0))


def history(state: dict) -> dict[str, str]:
    """What the weights file says of its training, for `training.train --init` to count on from."""
    figures = {"steps": state["step"], "samples": state["samples"], "sequences": sequences(state)}
    return {"model": "nano", "hours": f"{state['seconds'] / 3600:.2f}"} | {name: str(n) for name, n in figures.items()}


def write_card(state: dict, results: dict[str, Table]) -> None:
    """Fill the template with what the run and the evaluation say."""
    sections = [f"### {name}\n\n{markdown(table)}" for name, table in results.items()]
    text = TEMPLATE.read_text().format(
        parameters=sum(v.numel() for v in state["mean"].values()) / 1e6, steps=state["step"],
        samples=state["samples"], hours=state["seconds"] / 3600, sequences=sequences(state),
        frames=NUM_FRAMES, long=NUM_FRAMES_LONG, tables="\n\n".join(sections),
        rate=state["config"]["rate"], seed=state["config"]["seed"],
        init=f"own, of step {state['earlier']['steps']}" if state["earlier"] else "random",
    )  # fmt: skip
    CARD.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_OUT / CHECKPOINT)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--limit", type=int, default=96, help="sequences per held-out shard")
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="folders of real sequences for the card")
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    model = load_model(args.checkpoint)
    splits = ("held-out", "tame", "held-out-long")
    results = {split: evaluate(model, held_out(args.data, split, args.limit)) for split in splits}
    for split, table in results.items():
        print_table(split, table)
    if reasons := beats_controls(results["held-out"]):
        raise SystemExit("not shipped: " + "; ".join(reasons))
    if SHIPPED.exists():
        try:
            old = evaluate(load_model(SHIPPED), held_out(args.data, "held-out", args.limit))
        except RuntimeError as error:  # another architecture
            print(f"the shipped weights do not fit this code and are replaced ({str(error).splitlines()[0]})")
        else:
            if not beats_shipped(results["held-out"], old):
                raise SystemExit("not shipped: the shipped weights are better on the held-out scenes")
    for folder in args.real:
        results[folder.name] = evaluate(model, real_windows(folder, 1))
        print_table(folder.name, results[folder.name])
    SHIPPED.parent.mkdir(exist_ok=True)
    mean = {name: value.contiguous() for name, value in state["mean"].items()}
    save_file(mean, SHIPPED, metadata=history(state))
    SHIPPED.chmod(0o644)  # safetensors makes it private
    write_card(state, results)
    print(json.dumps({"shipped": SHIPPED.name, "bytes": SHIPPED.stat().st_size, "results": results}))


if __name__ == "__main__":
    main()
