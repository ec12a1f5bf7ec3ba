"""
Finished trials of a grid's output folder, added to a file of results/.

    python eval/merge_records.py --records DIR/records.jsonl --into results/FILE.jsonl [--poisons NAME...]

A trial that is there already is not added again, so the command can be given whenever more is finished. Afterwards
`python eval/pages.py` writes the tables.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
from eval.measured import add_selection_arguments, chosen_records
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.outputs import write_atomically
from jcdp_diffusers.results import read_records, whole_records


PARTS = ("victim", "accuracy")  # what a trial puts on record, in this order


def finished_trials(records: Sequence[Mapping]) -> dict[str, dict[str, Mapping]]:
    """By trial, its last accuracy and the record of the victim before it; trials that lack one are left out."""
    victims: dict[str, Mapping] = {}
    trials: dict[str, dict[str, Mapping]] = {}
    for record in records:
        trial = record.get("settings", {}).get("trial")
        if record["what"] == "victim" and trial is not None:
            victims[trial] = record
        elif record["what"] == "accuracy" and trial in victims:
            trials[trial] = {"victim": victims[trial], "accuracy": record}
    return trials


def merge(records: Sequence[Mapping], into: Path) -> tuple[int, int]:
    """
    Add what is finished and missing.

    Args:
        records (`Sequence[dict]`): Of one or more grids.
        into (`Path`): JSON Lines file, made with its folder if needed.

    Returns:
        `tuple[int, int]`: How many trials were added, and how many were there already.

    Raises:
        ValueError: If a trial is of a smoke run, or is there with another accuracy.
    """
    there = finished_trials(read_records(into)) if into.exists() else {}
    lines, added, kept = [], 0, 0
    for trial, parts in finished_trials(records).items():
        if parts["accuracy"]["settings"]["recipe"]["smoke"]:
            raise ValueError(f"records has trial {trial} of a smoke run, but must have figures that mean something.")
        if trial in there:
            before, now = (one["accuracy"]["value"] for one in (there[trial], parts))
            if before != now:
                raise ValueError(f"records has accuracy {now} for trial {trial}, but into has {before}.")
            kept += 1
            continue
        lines += [json.dumps(parts[part], ensure_ascii=False) for part in PARTS]
        added += 1
    if lines:
        before = whole_records(into.read_bytes()) if into.exists() else b""
        into.parent.mkdir(parents=True, exist_ok=True)
        ended = b"" if before.endswith(b"\n") or not before else b"\n"
        write_atomically(into, before + ended + "".join(line + "\n" for line in lines).encode())
    return added, kept


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    add_selection_arguments(parser)
    parser.add_argument("--into", required=True, help="JSON Lines file of results/")
    args = parser.parse_args()
    with ends_in_one_sentence("merge_records"):
        added, kept = merge(chosen_records(args), Path(args.into))
    print(f"{args.into}: {added} trials added, {kept} were there already.")


if __name__ == "__main__":
    main()
