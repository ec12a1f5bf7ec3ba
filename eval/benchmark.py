"""
A grid of poisons, countermeasures, victims and seeds from one small file.

    python eval/benchmark.py GRID.yaml --output DIR
    torchrun --nproc_per_node 8 eval/benchmark.py GRID.yaml --output DIR
    python eval/benchmark.py GRID.yaml --output DIR --engine ray --address auto

Every trial is a victim and a record, named by the content of all that decides it. So the command can be stopped at any
time and given again, and measures only what is missing when the grid grows. `eval/README.md` shows a grid file.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch


sys.path.append(str(Path(__file__).parents[1]))

from eval.grid_file import DATA_ROLES, Column, Grid, read_grid, typed
from jcdp_diffusers import countermeasures, engines, victims
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.countermeasures import Pairs, make_pairs
from jcdp_diffusers.countermeasures.purifiers import check_purifier_suits
from jcdp_diffusers.data import LabelledImages, join_labels, load_images
from jcdp_diffusers.data.checks import check_separation, check_sets, few_of_each_class
from jcdp_diffusers.data.examples import digits
from jcdp_diffusers.data.perturbations import measured_norms
from jcdp_diffusers.devices import default_device, usable_device
from jcdp_diffusers.perceptual import LPIPSModel, load_perceptual
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.poisons import control
from jcdp_diffusers.poisons import get as get_poison
from jcdp_diffusers.poisons.protect import protect_dataset, read_card
from jcdp_diffusers.results import as_settings
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.default_purifier import Plan, plan_for, purifier_to_be, train_planned
from jcdp_diffusers.train.provenance import check_trained_on
from jcdp_diffusers.trials import Trial, describe_images, measure
from jcdp_diffusers.victims import RECIPE_NAMES, check_victim
from jcdp_diffusers.victims.finetuning import COLLECTED, InitFrom, check_start, read_weights


DIGITS = (900, 500, 397)
SMOKE_IMAGES = 200
UNKNOWN = "unknown"  # the roles of records whose purifier may have seen any image


def run_grid(
    grid: Grid,
    output_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    processes: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """
    Measure what is missing of a grid.

    Args:
        grid (`Grid`): What to measure.
        output_dir (`str` or `Path`): Gets `records.jsonl`; protected and purified images and the purifier are kept
            beside it.
        device, processes, engine, address, progress: See `trials.measure`.
        say (`Callable`): Where a line about each stage goes.

    Returns:
        `list[Trial]`: All trials of the grid, each of them on record.
    """
    engines.check(engine, processes, address, device)
    # Absolute, because workers on Ray may have another working directory.
    output_dir = Path(output_dir).absolute()
    device = torch.device(device) if engine == "ray" else usable_device(device)
    perceptual = None if grid.perceptual is None else load_perceptual(grid.perceptual)
    output_dir.mkdir(parents=True, exist_ok=True)
    data_name, clean, collected, test = load_roles(grid)
    clean, test, collected = check_sets({"protected": clean, "test": test}, {"collected": collected}).values()
    check_separation(clean, collected, test, None, roles=grid.roles)
    _check_victims(grid, clean, test, collected)
    _check_starts(grid, clean, collected)
    _check_columns(grid, clean, collected, perceptual, device)
    roles = _roles(grid, clean, test, say)
    say(f"{grid.name}: {len(clean)} images to protect, {len(collected)} collected, {len(test)} for the test")

    def make() -> dict[str, str]:
        for name, (images, _) in _protected(grid, clean, output_dir, device).items():
            if name != "none":
                check_separation(images, collected, test, clean, roles=grid.roles)
        _pairs(grid, clean, collected, output_dir, device, lambda line: None)
        return _purifiers(grid, collected, perceptual, output_dir, device, say)

    with contextlib.ExitStack() as stack:
        lock = engines.folder_lock(output_dir / ".lock")
        engines.first_rank_decides(lambda: stack.enter_context(lock))
        purifiers = engines.first_rank_decides(make)
        protected = _protected(grid, clean, output_dir, device)  # as rank 0 has made and kept them
        pairs = _pairs(grid, clean, collected, output_dir, device, say)
        probe = None if grid.method == "supervised" else clean
        told = data_name, protected, test, purifiers, roles, output_dir / "prepared", probe
        trials = grid_trials(grid, *told, collected, pairs=pairs)
        measure(
            trials,
            output_dir / "records.jsonl",
            device=device,
            processes=processes,
            engine=engine,
            address=address,
            progress=progress,
        )
    return trials


def grid_trials(
    grid: Grid,
    data_name: str,
    protected: Mapping[str, tuple[LabelledImages, dict]],
    test: LabelledImages,
    purifiers: Mapping[str, str],
    roles: str,
    work_dir: Path,
    probe: LabelledImages | None = None,
    collected: LabelledImages | None = None,
    *,
    pairs: Mapping[tuple[str, int | None], Pairs] | None = None,
) -> list[Trial]:
    """
    The trials of a grid, a whole table of one seed before the second seed.

    Args:
        grid (`Grid`): What to measure.
        data_name (`str`): What records call the data.
        protected (`dict`): By poison, the training images and what records say of the poison.
        test (`LabelledImages`): Clean test images.
        purifiers (`dict`): By column that needs one, its folder or Hub id.
        roles (`str`): What records say of the purifiers' training images.
        work_dir (`Path`), probe, collected (`LabelledImages`, *optional*): See `Trial`; victims may be pretrained on
            the last, too.
        pairs (`dict`, *optional*): For columns that need pairs, these by poison and number. A poison that is not
            there has no such trial.
    """
    starts = {title: _start(grid, column, collected) for title, column in grid.columns().items()}
    facts = {"grid": grid.name, "dataset": data_name, "collected": _collected_name(grid, data_name), **grid.about}
    trials = []
    for seed in grid.seeds:
        for victim in grid.victims:
            for poison, (images, poison_facts) in protected.items():
                for title, column in grid.columns().items():
                    paired = (pairs or {}).get((poison, column.collected)) if column.needs_pairs else None
                    if column.needs_pairs and paired is None:
                        continue
                    about = facts | {"poison": poison, "column": title, **poison_facts}
                    about |= {"roles": roles} if column.needs_purifier else {}
                    # Disjoint roles are no part of the names of those that have no purifier.
                    if grid.roles != "disjoint" and _learns_from_collected(column):
                        about |= {"roles": grid.roles}
                    about |= {} if column.collected is None else {"collected_count": column.collected}
                    trials.append(
                        Trial(
                            images,
                            test,
                            grid.full_recipe,
                            seed,
                            victim=victim,
                            method=grid.method,
                            probe=probe,
                            width=grid.width,
                            countermeasure=column.countermeasure,
                            purifier=purifiers.get(title),
                            purification=column.purification,
                            draws=column.draws,
                            pairs=paired,
                            init_from=starts[title],
                            collected=collected if column.needs_collected else None,
                            work_dir=work_dir,
                            about=about,
                        )
                    )
    return trials


def _learns_from_collected(column: Column) -> bool:
    """Whether anything but a purifier learns from collected images."""
    return column.needs_pairs or column.needs_collected or column.init_from == COLLECTED


def _start(grid: Grid, column: Column, collected: LabelledImages | None) -> InitFrom | None:
    """What a column's victims start from."""
    if column.init_from is None:
        return None
    if column.init_from != COLLECTED:
        return InitFrom(read_weights(column.init_from), column.finetune)
    return InitFrom(_collected_for(column.collected, collected), column.finetune, grid.pretraining_recipe)


def _check_victims(grid: Grid, clean: LabelledImages, test: LabelledImages, collected: LabelledImages) -> None:
    """Refuse images that victims or countermeasures cannot take, before anything is made."""
    probe, recipe = None if grid.method == "supervised" else clean, grid.full_recipe.for_images(len(clean))
    for victim in grid.victims:
        victims.check_width(victim, recipe.width if grid.width is None else grid.width)
        check_victim(clean, test, victim=victim, method=grid.method, probe=probe, recipe=recipe)
    for column in grid.columns().values():
        measure = countermeasures.get(column.countermeasure, smoke=recipe.smoke)
        measure.require_draws(column.draws)
        measure.require_images(clean)
        measure.require_collected(collected)


def _check_starts(grid: Grid, clean: LabelledImages, collected: LabelledImages) -> None:
    """Refuse weights that cannot be read, or do not suit the victims, before anything is made."""
    width = grid.full_recipe.width if grid.width is None else grid.width
    for column in grid.columns().values():
        start = _start(grid, column, collected)
        for victim in grid.victims if start is not None else ():
            check_start(start, victim, width, clean.images.shape[1:])


def _check_columns(
    grid: Grid, clean: LabelledImages, collected: LabelledImages, perceptual: LPIPSModel | None, device: torch.device
) -> None:
    """Refuse columns that the purifier cannot serve, before anything is made."""
    for column in grid.columns().values():
        if not column.needs_purifier:
            continue
        if grid.purifier is None:
            images = _collected_for(column.collected, collected)
            pipe = purifier_to_be(_planned(images, grid, device), images, perceptual)
        else:
            pipe = JointConditionalPurificationPipeline.from_pretrained(grid.purifier)
        check_purifier_suits(countermeasures.get(column.countermeasure), pipe, column.purification, clean)


def _roles(grid: Grid, clean: LabelledImages, test: LabelledImages, say: Callable[[str], None]) -> str:
    """What records say of the purifier's training images."""
    if grid.purifier is None:
        return grid.roles
    if check_trained_on(grid.purifier, {"protected": clean, "test": test}, roles=grid.roles) is not None:
        return grid.roles
    say(f"{grid.purifier} does not list the images that trained it: its trials get the roles {UNKNOWN!r}.")
    return UNKNOWN


def load_roles(grid: Grid) -> tuple[str, LabelledImages, LabelledImages, LabelledImages]:
    """Name of the data, and its three roles: clean images to protect, collected, test."""
    if grid.data == "digits":
        name, (clean, collected, test) = "digits", digits(DIGITS)
    else:
        clean, collected, test = (_load(role, grid.data[role]) for role in DATA_ROLES)
        name = str(grid.data.get("name", grid.name))
    if grid.roles == "paper":
        collected = test
    for count in (column.collected for column in grid.columns().values()):
        if count is not None and count > len(collected):
            raise ValueError(f"countermeasures has collected {count}, but {len(collected)} images are collected.")
    if grid.full_recipe.smoke:
        clean, test = few_of_each_class(clean, SMOKE_IMAGES), few_of_each_class(test, SMOKE_IMAGES)
        collected = test if grid.roles == "paper" else collected.subset(range(min(SMOKE_IMAGES, len(collected))))
    return name, clean, collected, test


def _load(role: str, entry: Mapping[str, Any]) -> LabelledImages:
    entry = dict(entry)
    entry.pop("name", None)  # what records call it
    first, count = entry.pop("first", 0), entry.pop("count", None)
    try:
        data = load_images(entry.pop("source"), **entry)
    except (ValueError, OSError) as error:
        raise ValueError(f"data has for {role}: {error}") from error
    end = len(data) if count is None else first + count
    if not 0 <= first < end <= len(data):
        raise ValueError(f"data has for {role} the rows {first} to {end}, but the source has {len(data)}.")
    return data.subset(range(first, end))


def _collected_name(grid: Grid, data_name: str) -> str:
    return str(grid.data["collected"].get("name", data_name)) if isinstance(grid.data, dict) else data_name


def _protected(
    grid: Grid, clean: LabelledImages, output_dir: Path, device: torch.device
) -> dict[str, tuple[LabelledImages, dict]]:
    """By poison, the training images, made once and kept, and what records say of the poison."""
    return {
        name: (clean, {}) if name == "none" else _protect(clean, name, grid, output_dir, device)
        for name in grid.poisons
    }


def _protect(
    clean: LabelledImages, entry: str, grid: Grid, output_dir: Path, device: torch.device
) -> tuple[LabelledImages, dict]:
    """The protected images, made once and kept, and what their card says; or the control made from them."""
    name = entry.removesuffix(control.SUFFIX)
    preset = "smoke" if grid.full_recipe.smoke else grid.poison_preset
    folder = output_dir / "poisons" / f"{name}-{preset}-{grid.poison_seed}-{describe_images(clean)['content'][:8]}"
    settings = get_poison(name).changed(preset, grid.poison_settings)
    options = {"method": name, "preset": settings, "seed": grid.poison_seed, "device": device, "source": None}
    data = protect_dataset(clean, folder, **options)
    card = read_card(folder)
    facts = {"poison_preset": preset, "poison_seed": grid.poison_seed, "poison_settings": card["settings"]}
    protected = clean.with_images(data.images)
    if entry.endswith(control.SUFFIX):
        protected = control.norm_matched(clean, protected, seed=grid.poison_seed)
        return protected, facts | {"poison_norms": measured_norms(clean.images, protected.images)}
    return protected, facts | {"poison_norms": card["measured"], "poison_seconds": card["seconds"]}


def _pairs(
    grid: Grid, clean: LabelledImages, collected: LabelledImages, output_dir: Path, device: torch.device, say
) -> dict[tuple[str, int | None], Pairs]:
    """By poison and number, collected images and what the poison makes of them, made once and kept."""
    counts = dict.fromkeys(column.collected for column in grid.columns().values() if column.needs_pairs)
    pairs = {}
    if counts and collected.labels is None:
        raise ValueError("data has for collected no labels, but the poisons that make pairs need one for every image.")
    for name in grid.poisons if counts else ():
        if name == "none" or name.endswith(control.SUFFIX):
            say(f"{name} is no protection tool: it has no pairs, and no trial of a column that needs them.")
            continue
        for count in counts:
            originals = join_labels({"protected": clean, "collected": _collected_for(count, collected)})["collected"]
            pairs[name, count] = make_pairs(_protect(originals, name, grid, output_dir, device)[0], originals)
    return pairs


def _purifiers(
    grid: Grid, collected: LabelledImages, perceptual: LPIPSModel | None, output_dir: Path, device: torch.device, say
) -> dict[str, str]:
    """The purifier of each column that needs one, trained where the grid names none."""
    counts = {title: column.collected for title, column in grid.columns().items() if column.needs_purifier}
    if grid.purifier is not None:
        there = Path(grid.purifier).expanduser()
        return dict.fromkeys(counts, str(there.absolute()) if there.exists() else grid.purifier)
    folders = {}
    for count in dict.fromkeys(counts.values()):
        images = _collected_for(count, collected)
        folders[count] = str(_train(images, grid, perceptual, output_dir, device, say))
    return {title: folders[count] for title, count in counts.items()}


def _collected_for(count: int | None, collected: LabelledImages) -> LabelledImages:
    """The collected images that train a column's purifier; a smoke run may have fewer."""
    return collected if count is None else collected.subset(range(min(count, len(collected))))


def _planned(collected: LabelledImages, grid: Grid, device: torch.device) -> Plan:
    """What suits images and device, with what the grid changes of it but for a smoke run."""
    smoke = grid.full_recipe.smoke
    plan = plan_for(collected, device, smoke)
    training = dataclasses.replace(
        plan.training,
        cpu=device.type == "cpu",
        resume_from_checkpoint="latest",
        **({} if smoke else typed("training", grid.training, TrainingConfig)),
    )
    unet = plan.unet if smoke or grid.unet is None else grid.unet
    return dataclasses.replace(plan, unet=unet, training=training)


def _train(
    collected: LabelledImages,
    grid: Grid,
    perceptual: LPIPSModel | None,
    output_dir: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> Path:
    """The purifier, trained once and kept."""
    plan = _planned(collected, grid, device)
    deciding = [plan.unet, as_settings(plan.training), describe_images(collected), grid.perceptual]
    digest = hashlib.blake2b(json.dumps(deciding, default=str).encode(), digest_size=4)
    folder = output_dir / f"purifier-{digest.hexdigest()}"
    done = folder / "finished"
    if not done.exists():
        say(f"Training a purifier on {len(collected)} images: {plan.unet}, {plan.training.max_train_steps} steps")
        _train_alone(plan, collected, folder, perceptual)
        done.touch()
    return folder


def _train_alone(plan: Plan, collected: LabelledImages, folder: Path, perceptual: LPIPSModel | None) -> None:
    """
    Train a purifier in one process, however many ranks there are: its weights depend on their number.

    Accelerate would train on all ranks of a launcher together. So under a launcher this is a process that is no rank.
    """
    if engines.ranks()[1] == 1:
        train_planned(plan, collected, folder, perceptual)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_leave_launcher) as pool:
        try:
            pool.submit(train_planned, plan, collected, folder, perceptual).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"{folder.name}: the process that trained it was ended by a signal.") from error


def _leave_launcher() -> None:
    engines.live_as_long_as_parent()
    keep_freed_memory()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def tables_command(grid: Grid, trials: Sequence[Trial], output_dir: str) -> str:
    """The command that shows what the grid measured, its first victim's if it has several."""
    options = ["--smoke"] if grid.full_recipe.smoke else []
    # A purifier's roles may be unknown, whatever the grid's are.
    roles = next((trial.about["roles"] for trial in trials if "roles" in trial.about), grid.roles)
    options += ["--roles", roles] if roles != "disjoint" else []
    options += ["--victim", grid.victims[0]] if grid.victims[0] != "resnet18" else []
    options += ["--method", grid.method] if grid.method != "supervised" else []
    return shlex.join(["python", "eval/tables.py", "grid", "--records", f"{Path(output_dir)}/records.jsonl", *options])


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("grid", metavar="GRID.yaml")
    parser.add_argument("--output", required=True, help="folder for records and whatever costs to make again")
    parser.add_argument("--recipe", "--protocol", dest="protocol", choices=RECIPE_NAMES, help="instead of the grid's")
    parser.add_argument("--roles", choices=("disjoint", "paper"), help="instead of the grid's")
    parser.add_argument("--seeds", type=int, nargs="+", help="themselves, such as 0 1 2, instead of the grid's")
    parser.add_argument(
        "--processes",
        type=int,
        help="victims at a time on this machine, one per processor if not given; on Ray, on the cluster",
    )
    parser.add_argument("--engine", choices=engines.ENGINES, default="local", help="ray: a Ray cluster")
    parser.add_argument("--address", help="of a running Ray cluster; one is started on this machine if not given")
    parser.add_argument("--device", help="a GPU of its own for each rank of a launcher, or the CPU, if not given")
    args = parser.parse_args()
    keep_freed_memory()
    with ends_in_one_sentence("benchmark", "the same command goes on from here"):
        rank, _ = engines.ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        grid = read_grid(args.grid, protocol=args.protocol, roles=args.roles, seeds=args.seeds)
        trials = run_grid(
            grid,
            args.output,
            device=args.device or default_device(),
            processes=args.processes,
            engine=args.engine,
            address=args.address,
            say=print if rank == 0 else lambda line: None,
        )
    if rank == 0:
        print(f"{len(trials)} trials on record: {tables_command(grid, trials, args.output)}")


if __name__ == "__main__":
    main()
