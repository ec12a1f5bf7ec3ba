"""What a purification costs, in counts that are exact and ratios that are generous; never in seconds."""

import multiprocessing
import os
import signal

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from eval import plain_loops, speed_tables, throughput, timing
from jcdp_diffusers import JointConditionalPurificationPipeline, LPIPSModel
from jcdp_diffusers.results import append_record, read_records


WHAT = ("peak", "step", "operators", "purifier", "noise", "training", "victim", "input")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A quick run of everything, and a second one, which finds everything on record."""
    folder = tmp_path_factory.mktemp("throughput")
    command = ["--quick", "--device", "cpu", "--output", str(folder / "records.jsonl")]
    before = torch.get_num_threads()
    try:
        throughput.main(command)
        found = read_records(folder / "records.jsonl")
        throughput.main(command)
        throughput.main(["plot", *command, "--figure", str(folder / "figure.png")])
    finally:
        torch.set_num_threads(before)
    assert len(read_records(folder / "records.jsonl")) == len(found)
    assert (folder / "figure.png").stat().st_size > 10_000
    return found


def values(records, what, **settings):
    return [r["value"] for r in records if r["what"] == what and settings.items() <= r["settings"].items()]


@pytest.mark.long
def test_every_section_leaves_records(records):
    assert {r["what"] for r in records} == set(WHAT)
    assert {r["protocol"] for r in records} == {"smoke"}
    for mode in ("float32", "float32 channels_last"):
        for kind in ("bare", "unguided", "guided"):
            assert [v["repeats"] for v in values(records, "step", mode=mode, kind=kind)] == [1, 1]
    assert all(value["images_per_second"] > 0 for value in values(records, "purifier"))


@pytest.mark.long
def test_ratios_stay_within_generous_bounds(records):
    """The network of this run is tiny, so what surrounds it weighs twenty times what it does beside a real one."""
    assert all(value["one_plus_rest"] < 1.5 for value in values(records, "step", kind="unguided"))
    assert all(value["one_plus_rest"] < 4 for value in values(records, "step", kind="guided"))
    assert all(value["ratio"] < 2 for what in ("training", "victim") for value in values(records, what))
    assert all(value["share"] < 0.25 for value in values(records, "input"))


def test_a_compiled_run_is_never_taken_for_a_plain_one():
    about = {"unet": "tiny32", "processor": "p", "run": "float32"}
    plain, compiled = (
        {"what": "purifier", "value": {"images_per_second": rate}, "settings": about | extra, "protocol": "throughput"}
        for rate, extra in ((1.0, {}), (2.0, {"compiled": True}))
    )
    machine = speed_tables.Machine([plain, compiled], "tiny32")
    assert machine.find("purifier", run="float32") == {"images_per_second": 1.0}
    assert machine.find("purifier", run="float32", compiled=True) == {"images_per_second": 2.0}
    assert speed_tables.Machine([compiled], "tiny32").find("purifier") == {}


def test_the_table_leaves_out_what_no_machine_was_asked():
    def step(mode, batch, rate):
        settings = {"unet": "tiny32", "processor": "a GPU", "mode": mode, "kind": "bare", "batch": batch}
        value = {"images_per_second": rate}
        return {"what": "step", "value": value, "settings": settings, "protocol": "throughput"}

    table = speed_tables.speed_table([step("float32 channels_last", 256, 3.0)], "tiny32")
    assert "| bare UNet, batch 256, images/s | 3.0 | n.m. |" in table
    assert "batch 16" not in table and "compiled" not in table


def test_smoke_figures_stand_in_tables_of_smoke_runs_alone(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    common = {"seed": None, "device": "cpu", "seconds": 1.0}
    for protocol, processor, ratio in (("throughput", "real", 1.25), ("smoke", "real", 9.0), ("smoke", "tried", 9.0)):
        settings, value = {"processor": processor, "unet": "tiny32"}, {"ratio": ratio, "quartiles": [ratio] * 2}
        append_record(path, what="training", value=value, protocol=protocol, settings=settings, **common)
    table = speed_tables.speed_table(read_records(path), "tiny32")
    assert "| a purifier's training step | 1.25 [1.25, 1.25] |" in table and "tried" not in table
    command = ["--output", str(path), "--unet", "tiny32", "--device", "cpu"]
    throughput.main(["table", *command, "--quick"])
    said = capsys.readouterr().out
    assert said.startswith("**Smoke run") and "| 9.00 [9.00, 9.00] | 9.00 [9.00, 9.00] |" in said
    bench = bench_of(path, quick=False)
    throughput.measure_input(bench)
    assert len(read_records(path)) == 3  # a smoke run's step is no base of a share


def bench_of(path, **changes):
    about = {"device": torch.device("cpu"), "clock": "wall", "repeats": 1, "unet": "tiny32", "batches": (1,)}
    return timing.Bench(**{"output": path, "quick": True, "compile": False} | about | changes)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["speed"], "section is 'speed', but accepted are peak, steps"),
        (["pixels", "--data", "here"], "--purifier is not given, but pixels needs it"),
        (["pixels", "--purifier", "here"], "--data is not given, but pixels needs it"),
        (["accuracy"], "--data is not given, but accuracy needs it"),
    ],
)
def test_a_section_that_is_unknown_or_lacks_its_data_is_wrong_usage(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as usage:
        throughput.main([*words, "--output", str(tmp_path / "records.jsonl")])
    assert usage.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("section", ["plot", "table"])
def test_what_has_no_records_yet_ends_in_one_sentence(tmp_path, section):
    with pytest.raises(SystemExit, match="^throughput: .* yet"):
        throughput.main([section, "--output", str(tmp_path / "records.jsonl"), "--device", "cpu"])


def test_the_process_of_the_authors_loop_may_die(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # a new Python would take seconds to begin
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(plain_loops, "serve_authors_loop", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="the authors' loop ended with exit code -9"):
        with plain_loops.authors_process(bench_of(tmp_path / "records.jsonl"), 1, 1) as seconds:
            seconds(tf32=False)


@pytest.mark.parametrize("count", [3, 16, 17])
def test_the_network_is_evaluated_rounds_times_steps_times_micro_batches(count):
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: calls.append(len(inputs[0])))
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipe(images, diffusion_steps=20, num_inference_steps=4, num_rounds=3, seed=0, micro_batch_size=8)
    assert calls == [8] * (3 * 4 * -(-count // 8))


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch as kernels, and the bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                    self.bytes += tensor.nbytes
        return out


def stub_step(batch, **guides):
    x = timing.random_images(batch)
    step = throughput.guided_step(timing.Stub(tiny_unet(), x), x, timing.TIMESTEP, **guides)
    with torch.no_grad():
        step(x)  # matrices of the perceptual network are made once
        with Operations() as operations:
            step(x)
    return operations, x.nbytes


@pytest.mark.parametrize(
    ("guides", "most_operations", "most_bytes"),
    [(timing.NO_GUIDES, 220, 40), ({"perceptual_guidance_scale": 0.0}, 380, 75), ({}, 650, 160)],
    ids=["unguided", "pixel", "both"],
)
def test_operations_and_allocations_of_a_step_are_bounded(guides, most_operations, most_bytes):
    """The number of operations does not grow with the batch, the memory that they take in all only in proportion."""
    small, image_bytes = stub_step(2, **guides)
    large, _ = stub_step(16, **guides)
    assert small.count == large.count <= most_operations
    assert small.bytes <= most_bytes * image_bytes and large.bytes <= most_bytes * 8 * image_bytes


@pytest.mark.parametrize("reference", ["fresh", "chain"])
def test_no_step_waits_for_the_device(reference):
    """Tensors on the meta device have no values: a step that read one, as a synchronisation does, would raise."""
    with torch.device("meta"):
        unet, x = tiny_unet().to("meta"), torch.empty(4, 3, 32, 32)
    step = throughput.guided_step(unet, x, timing.TIMESTEP, noise_reference=reference)
    with torch.no_grad():
        assert step(x).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_no_step_waits_for_a_gpu():
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler(), LPIPSModel("alex")).to("cuda")
    x = timing.random_images(4, "cuda")
    step = throughput.guided_step(pipe.unet, x, timing.TIMESTEP)
    with torch.no_grad():
        step(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
