"""
A whole data set in, a sharded learnable data set out, on any number of processes and machines.

    jcdp purify --purifier google/ddpm-cifar10-32 --dataset protected/ --output learnable/
    torchrun --nproc_per_node 8 -m jcdp_diffusers.purify --purifier ... --dataset ... --output learnable/
    jcdp purify --engine ray --address auto --purifier ... --dataset ... --output /shared/learnable/

A shard is a task of `engines`. A run that was stopped, in whatever way, goes on when the command is given again.
"""

import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch

from .. import engines
from ..acceleration.placement import place
from ..data import is_url
from ..hub import create_repository, push_dataset
from ..outputs import check_output_folder
from ..perceptual import load_perceptual
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..storage import Folder
from .dataset_card import SUMMARY_NAME, UNFINISHED_CARD, dataset_card, summarise_shards
from .manifest import RUN_NAME, run_on_record, settle_run
from .progress import Progress
from .reader import first_repeated
from .shards import ShardStore, explained
from .worker import Job, Worker


# What a run writes into its folder beside run.json and hidden state.
OWN_NAMES = ("*-*.parquet", "README.md", SUMMARY_NAME, "rejected")


def purify_dataset(
    dataset: Any,
    pipe: JointConditionalPurificationPipeline,
    *,
    output_dir: str | os.PathLike,
    seed: int = 0,
    **options,
) -> datasets.Dataset:
    """
    Purify a data set into a folder that `datasets.load_dataset(output_dir)` opens, and open it.

    Args:
        dataset, pipe, output_dir, seed, options: As for `purify_to_folder`.

    Returns:
        `datasets.Dataset`: The columns of the source, `image` purified; without the rows that were rejected.
    """
    summary = purify_to_folder(dataset, pipe, output_dir=output_dir, seed=seed, **options)
    # `datasets` takes paths for patterns.
    files = [glob.escape(Folder(output_dir).url_of(name)) for name in summary["files"]]
    return datasets.load_dataset("parquet", data_files={summary["split"]: files}, split=summary["split"])


def purify_to_folder(
    dataset: Any,
    pipe: JointConditionalPurificationPipeline | Callable[[], JointConditionalPurificationPipeline],
    *,
    output_dir: str | os.PathLike,
    engine: str = "local",
    processes: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    progress: bool = True,
    push_to_hub: str | None = None,
    **options,
) -> dict:
    """
    Purify a data set into a folder, or whatever is left of it.

    Args:
        dataset, output_dir: As for `Job`.
        pipe (`JointConditionalPurificationPipeline` or `Callable`): The purifier. For several workers, a function
            without arguments that opens it, such as `functools.partial(open_purifier, ...)`.
        engine (`str`), processes (`int`, *optional*), address (`str`, *optional*): As for `engines.run`.
        gpus (`float`): Of a worker on Ray.
        progress (`bool`): Show a bar, or now and then a line where there is no terminal.
        push_to_hub (`str`, *optional*): Repository to publish the finished data set in.
        options: Of `Job`; all others are settings, as for `pipe(...)`.

    Returns:
        `dict`: Counts, times and checksums, as in `summary.json`; the split, and the `fit` of the images.

    Raises:
        ValueError: For arguments that cannot be used, or a folder that holds another run, in one sentence.
        OSError: If the folder cannot be written to; what is finished stays finished.
        RuntimeError: If several workers fail, with the first failure.
    """
    here = engine == "local" and processes in (None, 1)
    own = {field.name for field in dataclasses.fields(Job)} - {"settings"}
    settings = {name: options.pop(name) for name in list(options) if name not in own}
    job, folder = Job(dataset, pipe, output_dir, settings=settings, **options), Folder(output_dir)
    engines.check(engine, processes, address)
    if not here and isinstance(pipe, JointConditionalPurificationPipeline):
        raise ValueError(
            f"pipe is an opened purifier, but must be a function that opens it where engine is {engine!r} and "
            f"processes {processes}: functools.partial(open_purifier, NAME, DEVICE, output_dir=OUTPUT_DIR)."
        )
    _check(job, folder, push_to_hub)
    begun = run_on_record(folder)
    threads = job.threads or (begun and begun["arithmetic"]["threads"]) or 1
    how = {"engine": engine, "processes": processes, "address": address, "gpus": gpus, "threads": threads}
    with explained(folder), contextlib.ExitStack() as stack:
        worker = Worker(job) if engine == "local" else None
        plan = worker.plan(None if here else processes) if worker else _planned_elsewhere(job, how)
        worker = stack.enter_context(worker) if here else None
        rows, split = plan[0]["source"]["rows"], plan[0]["source"]["split"]
        if rows is None and not (here and engines.ranks()[1] == 1):
            raise ValueError(
                f"engine is {engine!r} and processes {processes}, but must be 'local' and 1, without a launcher, for "
                "a data set of unknown length."
            )
        run = engines.first_rank_decides(lambda: _begin(folder, plan, stack))
        if push_to_hub is not None:  # whoever may not push learns it before the work
            engines.first_rank_decides(lambda: create_repository(push_to_hub, repo_type="dataset"))
        store = ShardStore(folder, split, rows=rows, **run["shards"])
        open_worker = functools.cache(worker.join) if here else functools.partial(_join, job)
        while True:
            _make_shards(store, worker, open_worker, how, progress)
            if engines.first_rank_decides(lambda: all_intact(store)):
                return engines.first_rank_decides(lambda: finish(store, run, push_to_hub))


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard, for `engines.run`."""

    store: ShardStore
    index: int

    @property
    def name(self) -> str:
        return f"shard {self.index}"

    def is_done(self) -> bool:
        return self.store.is_finished(self.index)

    def run(self, worker: Worker) -> dict | None:
        return worker.make(self.store, self.index)


class PlanTask:
    """What the run is to be, found out by a worker, because the devices are there."""

    name = "plan"

    def is_done(self) -> bool:
        return False

    def run(self, worker: Worker) -> tuple[dict, dict, str | None]:
        return worker.plan()


def open_purifier(
    purifier: str | os.PathLike,
    device: torch.device | str | None = None,
    *,
    output_dir: str | os.PathLike,
    precision: str = "auto",
    compiled: bool = False,
    perceptual: str | os.PathLike | None = None,
    **options,
) -> JointConditionalPurificationPipeline:
    """
    Load a purifier and place it, for a purification that may have been begun before.

    Args:
        purifier (`str` or `os.PathLike`): Folder or Hub id of a DDPM.
        device (`torch.device` or `str`, *optional*): As for `place`; by default the GPU that is this process's, if
            there is one, and so for `"cuda"`.
        output_dir (`str` or `os.PathLike`): Where the purified data set will be.
        precision (`str`): As for `place`; but `"auto"` is what the run in `output_dir` was begun in, if there is one.
        compiled (`bool`): As for `place`.
        perceptual (`str` or `os.PathLike`, *optional*): As for `load_perceptual`; the repository's own by default.
        options: As for `from_pretrained`.
    """
    if (device is None or str(device) == "cuda") and torch.cuda.is_available():
        if "LOCAL_RANK" in os.environ:  # or each process would take memory on the first one, too
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    if perceptual is not None:
        options["perceptual"] = load_perceptual(perceptual)
    pipe = JointConditionalPurificationPipeline.from_pretrained(purifier, **options)
    if precision == "auto" and (run := run_on_record(Folder(output_dir))) is not None:
        precision = run["arithmetic"]["dtype"]
    return place(pipe, device or "cpu", precision=precision, compiled=compiled)


def all_intact(store: ShardStore) -> bool:
    """Compare every shard with its checksum; a damaged one becomes unfinished again."""
    with ThreadPoolExecutor(8) as pool:
        intact = list(pool.map(store.is_intact, range(store.count)))
    for index, good in enumerate(intact):
        if not good:
            engines.say(f"{store.name(index)} is not what was written: it will be made again")
            store.discard(index)
    return all(intact)


def finish(store: ShardStore, run: dict, push_to_hub: str | None) -> dict:
    """Count everything, then write summary and card, and publish if asked."""
    folder, name, count = store.folder, run["source"]["name"], store.count
    if count == 0:
        raise ValueError(f"dataset {name!r} has no rows in split {store.split!r}: at least one is needed.")
    records = {store.name(index): store.record(index) for index in range(count)}
    summary = summarise_shards(records)
    written = sum(pq.read_metadata(name, filesystem=folder.fs).num_rows for name in records)
    # A stream's length is what its shards say, all of which must be full but the last.
    expected = store.rows or store.range(count - 1)[0] + store.record(count - 1)["rows_in"]
    if summary["rows_in"] != expected or written + summary["rejected"] != expected:
        raise ValueError(
            f"dataset {name!r} has {expected} rows; {summary['rows_in']} were read, {written} written, "
            f"{summary['rejected']} rejected: it must have changed meanwhile, so begin anew in another output_dir."
        )
    # A stream could not be looked at before.
    if store.rows is None and (repeated := first_repeated(store.ids)) is not None:
        raise ValueError(
            f"dataset {name!r} has the id {repeated!r} more than once, but must have it once: begin anew with other "
            "ids in another output_dir."
        )
    if written == 0:
        raise ValueError(f"dataset {name!r} has no image that can be used: see {folder.url_of('rejected')}.")
    folder.write("README.md", f"{dataset_card(run, summary, os.path.basename(folder.root))}\n")
    store.remove_leftovers()
    folder.write(SUMMARY_NAME, json.dumps(summary, indent=2))
    if push_to_hub is not None:
        push_dataset(folder.local, push_to_hub)
    return summary | {"split": store.split, "fit": run["sizes"]["fit"]}


def _check(job: Job, folder: Folder, push_to_hub: str | None) -> None:
    """Refuse what no purifier could make right, before one is opened."""
    job.check()
    source = Folder(job.dataset, "dataset").local if is_url(job.dataset) else job.dataset
    if folder.local is not None:
        check_output_folder(folder.local, marks=(RUN_NAME,), own=OWN_NAMES, sources={"dataset": source})
    elif (names := folder.names("")) and RUN_NAME not in names:
        raise ValueError(
            f"output_dir is {folder.url!r}, which holds {names[0]!r}, but must be empty or a folder in which the same "
            "command was begun."
        )
    if push_to_hub is not None and folder.local is None:
        raise ValueError(f"output_dir is {folder.url!r}, but must be a local folder where push_to_hub is given.")


def _planned_elsewhere(job: Job, how: dict) -> tuple[dict, dict, str | None]:
    """What a worker plans, because the devices are there."""
    plans = []
    open_worker = functools.partial(Worker, job)
    engines.run([PlanTask()], open_worker=open_worker, on_done=lambda _, plan: plans.append(plan), **how)
    return plans[0]


def _begin(folder: Folder, plan: tuple[dict, dict, str | None], stack: contextlib.ExitStack) -> dict:
    """Keep other commands away for as long as the stack is open, and begin the run or find the same one."""
    asked, begin, note = plan
    folder.fs.makedirs("", exist_ok=True)
    if folder.local is not None:
        stack.enter_context(engines.folder_lock(folder.local / ".lock"))
    if note is not None:
        engines.say(note)
    return settle_run(folder, asked, begin)


def _join(job: Job) -> Worker:
    return Worker(job).join()


def _make_shards(
    store: ShardStore, worker: Worker | None, open_worker: Callable[[], Worker], how: dict, progress: bool
) -> None:
    """Run the tasks of all shards that are not finished."""
    rank, world = engines.ranks()
    # All ranks must name the same shards; one that comes late would find more of them finished.
    finished = engines.first_rank_decides(store.finished)
    if rank == 0 and len(finished) != store.count:
        store.folder.remove(SUMMARY_NAME)
        store.folder.write("README.md", UNFINISHED_CARD.format(split=store.split))
    own = [index for index in range(store.count or 0) if index not in finished][rank::world]
    done = 0 if store.rows is None else store.rows - sum(stop - start for start, stop in map(store.range, own))
    with Progress(store.rows, done, show=progress and rank == 0) as bar:

        def on_done(_, record: dict | None) -> None:
            if worker is None and record is not None:
                bar.add(record["rows_in"], record["rejected"])

        if worker is not None:
            worker.on_rows, worker.on_squares = bar.add, bar.at
        # A stream has one more as long as its end is not known.
        indices = itertools.takewhile(lambda index: store.count is None or index < store.count, itertools.count())
        missing = (ShardTask(store, index) for index in indices if index not in finished)
        engines.run(missing, open_worker=open_worker, on_done=on_done, **how)
