"""Converted checkpoints give the outputs of the networks they come from, which are written here from their description."""

import math
import re
import runpy
import sys

import pytest
import torch
from diffusers import DDPMPipeline
from torch import nn
from torch.nn import functional as F

from training import convert_checkpoint


def convert(tmp_path, content, *options):
    torch.save(content, tmp_path / "checkpoint.pth")
    arguments = [str(tmp_path / "checkpoint.pth"), "--output_dir", str(tmp_path / "out"), *options]
    convert_checkpoint.main(convert_checkpoint.parse_args(arguments))
    return DDPMPipeline.from_pretrained(tmp_path / "out")


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter at random, so that none can be lost or confused unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)
    return module.eval()


def outputs(network, channels=3, size=16):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, channels, size, size, generator=generator)
    with torch.no_grad():
        out = network(x, torch.tensor([3, 611]))
    return out if torch.is_tensor(out) else out.sample


def assert_same(converted, original, **kwargs):
    expected = outputs(original, **kwargs)
    assert expected.std() > 0.05
    assert torch.allclose(outputs(converted, **kwargs), expected, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------- the layout of ermongroup/ddim


def group_norm(channels, eps):
    return nn.GroupNorm(32, channels, eps=eps)


class DDIMBlock(nn.Module):
    def __init__(self, inputs, outputs, embedding):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs, 1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, outputs)
        self.norm2, self.conv2 = group_norm(outputs, 1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DDIMAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).mul(x.shape[1] ** -0.5).softmax(2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, channels, down):
        super().__init__()
        self.conv, self.down = (
            nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1),
            down,
        )

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class DDIMNetwork(nn.Module):
    """The original DDPM's network: sine before cosine, one attention head, downsampling padded on one side."""

    def __init__(self, width=32, multipliers=(1, 2, 2), blocks=2, attention=(1,), channels=3):
        super().__init__()
        widths, embedding = [width * m for m in multipliers], 4 * width
        self.width, self.attention = width, attention
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, skips, here = nn.ModuleList(), [width], width
        for level, out in enumerate(widths):
            stage = nn.Module()
            stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                stage.block.append(DDIMBlock(here, out, embedding))
                if level in attention:
                    stage.attn.append(DDIMAttention(out))
                here = out
                skips.append(here)
            if level < len(widths) - 1:
                stage.downsample = Resample(here, down=True)
                skips.append(here)
            self.down.append(stage)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = DDIMBlock(here, here, embedding), DDIMBlock(here, here, embedding)
        self.mid.attn_1 = DDIMAttention(here)
        stages = {}
        for level in reversed(range(len(widths))):
            stage = stages[level] = nn.Module()
            stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                stage.block.append(DDIMBlock(here + skips.pop(), widths[level], embedding))
                here = widths[level]
                if level in attention:
                    stage.attn.append(DDIMAttention(here))
            if level > 0:
                stage.upsample = Resample(here, down=False)
        self.up = nn.ModuleList(stages[level] for level in range(len(widths)))
        self.norm_out, self.conv_out = group_norm(here, 1e-6), nn.Conv2d(here, channels, 3, padding=1)

    def forward(self, x, t):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        embedding = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], dim=1))
        embedding = self.temb.dense[1](F.silu(embedding))
        skips = [self.conv_in(x)]
        for stage in self.down:
            for i, block in enumerate(stage.block):
                h = block(skips[-1], embedding)
                skips.append(stage.attn[i](h) if len(stage.attn) else h)
            if hasattr(stage, "downsample"):
                skips.append(stage.downsample(skips[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], embedding)), embedding)
        for stage in reversed(self.up):
            for i, block in enumerate(stage.block):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
                h = stage.attn[i](h) if len(stage.attn) else h
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def released(network, average):
    """A list of states as that repository saves it: the model of DataParallel, optimiser, epoch, step, the average."""
    model = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters()).state_dict()
    return [model, optimizer, 12, 3456, dict(average.named_parameters())]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_ddim_list_of_states(tmp_path, weights):
    raw, ema = randomize(DDIMNetwork(), seed=0), randomize(DDIMNetwork(), seed=1)
    pipe = convert(tmp_path, released(raw, ema), "--weights", weights, "--resolution", "16")
    assert_same(pipe.unet, ema if weights == "ema" else raw)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert (tmp_path / "out" / "purification_config.json").is_file()


def test_ddim_single_state_of_another_shape(tmp_path):
    network = randomize(DDIMNetwork(width=32, multipliers=(1, 1, 2, 3), blocks=1, attention=(2,), channels=1), seed=2)
    pipe = convert(tmp_path, network.state_dict(), "--resolution", "16")
    assert list(pipe.unet.config.down_block_types) == ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    assert_same(pipe.unet, network, channels=1)


def test_ddim_layout_is_that_of_ddpm_cifar10():
    """The paper's network has one form, whether it is converted or made by name."""
    from jcdp_diffusers.train.unets import named_unet

    with torch.device("meta"):
        network = DDIMNetwork(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,))
    state = {name: torch.zeros(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == 35_746_307
    converted = convert_checkpoint.convert_ddim(state, resolution=32, dropout=0.1)
    assert dict(converted.config) == dict(named_unet("ddpm-cifar10").config)


# --------------------------------------------------------------------------------- the layout of guided-diffusion


class GuidedBlock(nn.Module):
    def __init__(self, inputs, outputs, embedding, scale_shift, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(inputs, 1e-5), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (2 if scale_shift else 1)))
        convolution = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(group_norm(outputs, 1e-5), nn.SiLU(), nn.Dropout(0.0), convolution)
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scale_shift, self.resample = scale_shift, resample

    def forward(self, x, embedding):
        h = self.in_layers[:2](x)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)
        h = self.in_layers[2](h)
        e = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return h + self.skip_connection(x)


class GuidedAttention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.norm, self.qkv = group_norm(channels, 1e-5), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.heads, self.new_order = heads, new_order

    def forward(self, x, embedding=None):
        b, c, size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            q, k, v = (part.reshape(b, self.heads, -1, size) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b, self.heads, 3, -1, size).unbind(2)
        weights = torch.einsum("bhci,bhcj->bhij", q, k).mul((c // self.heads) ** -0.5).softmax(3)
        h = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(b, c, size)
        return x + self.proj_out(h).view_as(x)


class GuidedResample(nn.Module):
    def __init__(self, channels, down):
        super().__init__()
        setattr(self, "op" if down else "conv", nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=1))

    def forward(self, x, embedding):
        return self.op(x) if hasattr(self, "op") else self.conv(F.interpolate(x, scale_factor=2.0))


class GuidedNetwork(nn.Module):
    """Numbered blocks down, middle, numbered blocks up; cosine before sine; attention after each block of a level."""

    def __init__(
        self, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=32, scale_shift=True, updown=False,
        new_order=False, learn_sigma=True, width=32,
    ):  # fmt: skip
        super().__init__()
        self.width, embedding = width, 4 * width
        widths = [width * m for m in multipliers]

        def block(inputs, outputs, resample=None):
            return GuidedBlock(inputs, outputs, embedding, scale_shift, resample)

        def attend(channels):
            return GuidedAttention(channels, channels // head_channels, new_order)

        def resampler(channels, way):
            return block(channels, channels, way) if updown else GuidedResample(channels, way == "down")

        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, width, 3, padding=1)])])
        skips, here = [width], width
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList([block(here, out)] + [attend(out)] * (level in attention)))
                here = out
                skips.append(here)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([resampler(here, "down")]))
                skips.append(here)
        self.middle_block = nn.ModuleList([block(here, here), attend(here), block(here, here)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                parts = [block(here + skips.pop(), widths[level])] + [attend(widths[level])] * (level in attention)
                here = widths[level]
                if level > 0 and i == blocks:
                    parts.append(resampler(here, "up"))
                self.output_blocks.append(nn.ModuleList(parts))
        final = nn.Conv2d(here, 6 if learn_sigma else 3, 3, padding=1)
        self.out = nn.Sequential(group_norm(here, 1e-5), nn.SiLU(), final)

    def forward(self, x, t):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        skips = [self.input_blocks[0][0](x)]
        for parts in self.input_blocks[1:]:
            h = skips[-1]
            for part in parts:
                h = part(h, embedding)
            skips.append(h)
        h = skips[-1]
        for part in self.middle_block:
            h = part(h, embedding)
        for parts in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for part in parts:
                h = part(h, embedding)
        return self.out(h)[:, :3]


@pytest.mark.parametrize(
    "settings",
    [
        {"multipliers": (1, 2, 2), "blocks": 2, "attention": (1, 2)},
        {"updown": True, "attention": (0,)},
        {"updown": True, "multipliers": (1, 2, 3), "attention": (1,), "new_order": True},
        {"scale_shift": False, "learn_sigma": False, "head_channels": 16},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_guided_diffusion(tmp_path, settings):
    network = randomize(GuidedNetwork(**settings), seed=3)
    options = ["--num_head_channels", str(settings.get("head_channels", 32)), "--resolution", "16"]
    options += ["--new_attention_order"] if settings.get("new_order") else []
    pipe = convert(tmp_path, network.state_dict(), *options)
    assert pipe.unet.config.out_channels == 3
    assert_same(pipe.unet, network)


def test_guided_diffusion_by_number_of_heads(tmp_path):
    network = randomize(GuidedNetwork(attention=(1,), head_channels=16), seed=4)
    assert_same(convert(tmp_path, network.state_dict(), "--num_heads", "4", "--resolution", "16").unet, network)


# ------------------------------------------------------------------------------------------------------- refusals


def broken(network, changes):
    state = network.state_dict()
    for name, value in changes.items():
        if value is None:
            state = {key: tensor for key, tensor in state.items() if not re.match(name, key)}
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "options", "sentence"),
    [
        ({"weight": torch.zeros(1)}, [], "must have the layout of ermongroup/ddim"),
        ([{"weight": torch.zeros(1)}, {"state": {}}, 3, 4], [], "give --weights raw for a file without an average"),
        ([1, 2], ["--weights", "raw"], "holds 0 states"),
        ({"epoch": 3}, [], "holds no state of parameters"),
        (DDIMNetwork, {r"down\.\d+\.downsample": None}, "resamples without convolutions"),
        (DDIMNetwork, {"down.1.block.0.conv_shortcut.weight": torch.zeros(1)}, "3x3 convolutions as shortcuts"),
        (DDIMNetwork, {"conv_in.weight": torch.zeros(16, 3, 3, 3)}, "first level widens 16 channels to 32"),
        (DDIMNetwork, {"extra": torch.zeros(1)}, r"extra has the shape \(1,\) rather than None"),
        (GuidedNetwork, {"label_emb.weight": torch.zeros(10, 128)}, "conditioned on classes"),
        (GuidedNetwork, {r"(in|out)put_blocks\.\d+\.\d+\.(op|conv)\.": None}, "do not fall into levels"),
        (GuidedNetwork, {"time_embed.0.weight": torch.zeros(128, 16)}, "first level widens 16 channels to 32"),
        (DDIMNetwork, {r"down\.": None}, "it has no blocks on the way down"),
        (DDIMNetwork, {"conv_in.weight": None}, "its parameter 'conv_in.weight' is missing or out of place"),
        (GuidedNetwork, {"output_blocks": None}, "it has no blocks on the way up, as a classifier has none"),
        (GuidedNetwork, ["--num_heads", "0"], "num_heads is 0,"),
        (GuidedNetwork, [], "give --num_heads or --num_head_channels"),
        (lambda: GuidedNetwork(attention=(0, 1)), ["--num_heads", "2"], r"attention layers of \[32, 64\] channels"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, state, options, sentence):
    if callable(state):
        changes = options if isinstance(options, dict) else {}
        state, options = broken(state(), changes), ["--num_heads", "1"] if changes else options
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path, state, *options)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b""), "which is empty, cut short or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "which is empty, cut short or damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "which is a folder,"),
        (lambda path: path.write_text("<html>Not found</html>"), "which is no file of weights or holds code"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["empty", "truncated", "folder", "page", "missing"],
)
def test_files_that_cannot_be_read_end_in_one_sentence(tmp_path, monkeypatch, damage, sentence):
    path = tmp_path / "checkpoint.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    damage(path)
    monkeypatch.setattr(sys, "argv", [convert_checkpoint.__file__, str(path), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=sentence) as stopped:
        runpy.run_path(convert_checkpoint.__file__, run_name="__main__")
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code  # on stderr, with exit code 1


class Surprise:
    def __reduce__(self):
        return print, ("this must not be run",)


def test_code_in_a_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="is no file of weights or holds code"):
        convert(tmp_path, {"weight": Surprise()})
    assert "must not be run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "held",
    [
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "training_record.json",
        "checkpoint-9/progress.json",
    ],
)
def test_a_folder_that_holds_a_purifier_or_its_training_is_refused_before_the_work(tmp_path, held):
    """What is left of it, such as an index of other weights or a record, would belong to none."""
    held = tmp_path / "out" / held
    held.parent.mkdir(parents=True)
    held.write_text("{}")
    arguments = [str(tmp_path / "missing.pth"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="output_dir is .*out', which holds .*, but must be another folder"):
        convert_checkpoint.main(convert_checkpoint.parse_args(arguments))
    assert held.read_text() == "{}"
