"""
Turn a released diffusion checkpoint into a purifier repository.

    python training/convert_checkpoint.py ckpt.pth --output_dir my-purifier
    python training/convert_checkpoint.py 256x256_diffusion.pt --output_dir my-purifier --num_head_channels 64 \\
        --resolution 256

Two layouts are recognised by their parameters' names: that of ermongroup/ddim, in which the authors of JCDP release
theirs (a list of states with the averaged weights last, or one state alone), and that of OpenAI's guided-diffusion.
What the weights do not say has to be given: the image size, the number of attention heads (guided-diffusion) and the
noise schedule. Files are read with `weights_only=True`: code in them is refused, not run.
"""

import argparse
import pickle
import re
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.purification_config import CONFIG_NAME, default_settings
from jcdp_diffusers.train.provenance import TRAINED_ON_NAME
from jcdp_diffusers.train.record import RECORD_NAME


State = dict[str, torch.Tensor]
# Names in the folder of a purifier or of its training, finished or not.
OF_A_PURIFIER = (
    "model_index.json",
    "unet",
    "diffusion_pytorch_model*",
    "scheduler",
    "perceptual",
    CONFIG_NAME,
    RECORD_NAME,
    TRAINED_ON_NAME,
    "checkpoint-*",
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pth or .pt file")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a list of states (default: ema)")
    parser.add_argument("--resolution", type=int, default=32, help="side of the images in pixels (default: 32)")
    parser.add_argument("--dropout", type=float, default=0.0, help="if training is to go on (default: 0)")
    parser.add_argument("--num_heads", type=int, help="of every attention layer (guided-diffusion)")
    parser.add_argument("--num_head_channels", type=int, help="of every attention head (guided-diffusion)")
    parser.add_argument(
        "--new_attention_order", action="store_true", help="as in guided-diffusion's option of that name"
    )
    parser.add_argument("--num_train_timesteps", type=int, default=1000)
    parser.add_argument("--beta_schedule", default="linear", choices=("linear", "scaled_linear", "squaredcos_cap_v2"))
    parser.add_argument("--beta_start", type=float, default=1e-4)
    parser.add_argument("--beta_end", type=float, default=0.02)
    parser.add_argument("--variance_type", default="fixed_large", choices=("fixed_small", "fixed_large"))
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    check_new(args.output_dir)
    state = read_state(args.checkpoint, args.weights)
    try:
        unet = convert(state, args)
    except KeyError as error:
        raise _refuse(f"its parameter {error.args[0]!r} is missing or out of place") from error
    scheduler = DDPMScheduler(
        num_train_timesteps=args.num_train_timesteps,
        beta_schedule=args.beta_schedule,
        beta_start=args.beta_start,
        beta_end=args.beta_end,
        variance_type=args.variance_type,
        clip_sample=True,
    )
    DDPMPipeline(unet, scheduler).save_pretrained(args.output_dir)
    steps = args.num_train_timesteps
    default_settings(steps, trained_timesteps=(0, steps)).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {unet.num_parameters():,} parameters")


def check_new(output_dir: Path) -> None:
    """Refuse a folder whose files would be mixed with the purifier's: weights in another format, records of others."""
    for name in OF_A_PURIFIER:
        if found := sorted(output_dir.glob(name)):
            raise ValueError(
                f"output_dir is {str(output_dir)!r}, which holds {found[0].name!r} of a purifier or its training, but "
                "must be another folder: they would be mixed."
            )


def convert(state: State, args: argparse.Namespace) -> UNet2DModel:
    """The network, by the layout that the names of its parameters tell."""
    if "temb.dense.0.weight" in state:
        return convert_ddim(state, resolution=args.resolution, dropout=args.dropout)
    if "time_embed.0.weight" in state:
        return convert_guided_diffusion(
            state,
            resolution=args.resolution,
            dropout=args.dropout,
            num_heads=args.num_heads,
            num_head_channels=args.num_head_channels,
            new_attention_order=args.new_attention_order,
        )
    raise ValueError(
        f"checkpoint is {str(args.checkpoint)!r}, whose first parameter is {next(iter(state))!r}, but must have "
        "the layout of ermongroup/ddim ('temb.dense.0.weight') or guided-diffusion ('time_embed.0.weight')."
    )


# ------------------------------------------------------------------------------------------------------------ the file


def read_state(path: Path, weights: str = "ema") -> State:
    """
    Parameters by name from a checkpoint.

    Args:
        path (`Path`): A state dictionary, or the list [model, optimizer, epoch, step, average] of ermongroup/ddim, of
            which the average may be missing. The prefix of DataParallel is taken off.
        weights (`str`): `"ema"` for the list's average, `"raw"` for its model; a single state is what it is.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint is {str(path)!r}, which is no file of weights or holds code, but must hold tensors, numbers "
            "and lists only."
        ) from error
    except IsADirectoryError as error:
        raise ValueError(f"checkpoint is {str(path)!r}, which is a folder, but must be a file of weights.") from error
    except (EOFError, RuntimeError) as error:  # that is how torch.load reports an empty file, and half a one
        raise ValueError(
            f"checkpoint is {str(path)!r}, which is empty, cut short or damaged, but must be a whole file of weights: "
            "download it again."
        ) from error
    if isinstance(content, (list, tuple)):
        states = [part for part in content if _is_state(part)]
        if len(states) < (2 if weights == "ema" else 1):
            raise ValueError(
                f"weights is {weights!r}, but {str(path)!r} holds {len(states)} states: give --weights raw for a file "
                "without an average."
            )
        content = states[-1] if weights == "ema" else states[0]
    if not _is_state(content):
        raise ValueError(f"checkpoint is {str(path)!r}, which holds no state of parameters.")
    return {name.removeprefix("module."): tensor.float() for name, tensor in content.items()}


def _is_state(part) -> bool:
    return isinstance(part, dict) and bool(part) and all(torch.is_tensor(value) for value in part.values())


def _refuse(reason: str) -> ValueError:
    return ValueError(f"checkpoint cannot be converted: {reason}, which diffusers' UNet2DModel cannot express.")


def _levels(channels: list[int], attention: set[int], plain: str = "", resampler: str = "") -> dict:
    """Block types of diffusers by level; `plain` and `resampler` name those that resample with a residual block."""
    down = [
        f"{'Attn' if i in attention else plain}Down{resampler if i not in attention else ''}"
        for i in range(len(channels))
    ]
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(f"{name}Block2D" for name in down),
        "up_block_types": tuple(f"{name.replace('Down', 'Up')}Block2D" for name in reversed(down)),
    }


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _load(unet: UNet2DModel, state: State) -> UNet2DModel:
    """Fill the network; every parameter must find its place."""
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _refuse(f"{name} has the shape {found.get(name)} rather than {expected.get(name)}")
    unet.load_state_dict(state)
    return unet.eval()


# ----------------------------------------------------------------------------------------------------- ermongroup/ddim


def convert_ddim(state: State, *, resolution: int, dropout: float = 0.0) -> UNet2DModel:
    """
    The network of ermongroup/ddim, which is the original DDPM's.

    Its levels are counted from full resolution on the way down and up; its attention layers have one head and are 1x1
    convolutions; it downsamples with padding on the right and at the bottom.
    """
    if not any(name.startswith("down.0.block.0.") for name in state):
        raise _refuse("it has no blocks on the way down")
    num_levels = 1 + max(int(match[1]) for name in state if (match := re.match(r"down\.(\d+)\.", name)))
    num_blocks = 1 + max(int(match[1]) for name in state if (match := re.match(r"down\.0\.block\.(\d+)\.", name)))
    channels = [state[f"down.{level}.block.0.conv2.weight"].shape[0] for level in range(num_levels)]
    attention = {level for level in range(num_levels) if f"down.{level}.attn.0.q.weight" in state}
    if any("conv_shortcut" in name for name in state):
        raise _refuse("it has 3x3 convolutions as shortcuts")
    if num_levels > 1 and "down.0.downsample.conv.weight" not in state:
        raise _refuse("it resamples without convolutions")
    if state["conv_in.weight"].shape[0] != channels[0]:
        raise _refuse(f"its first level widens {state['conv_in.weight'].shape[0]} channels to {channels[0]}")
    unet = UNet2DModel(
        sample_size=resolution,
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=state["conv_out.weight"].shape[0],
        layers_per_block=num_blocks,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        dropout=dropout,
        **_levels(channels, attention),
    )
    rules = [
        (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
        (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
        (r"^norm_out\.", "conv_norm_out."),
        (r"^mid\.block_1\.", "mid_block.resnets.0."),
        (r"^mid\.block_2\.", "mid_block.resnets.1."),
        (r"^mid\.attn_1\.", "mid_block.attentions.0."),
        (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
        (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
        (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
        (r"\.temb_proj\.", ".time_emb_proj."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ]
    renamed = {}
    for name, tensor in state.items():
        name = _rename(name, rules)
        # diffusers counts the levels of the way up from the bottom.
        name = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{num_levels - 1 - int(match[1])}", name)
        is_projection = re.search(r"attentions\.\d+\.to_.*weight$", name)
        renamed[name] = tensor[:, :, 0, 0] if is_projection and tensor.ndim == 4 else tensor
    return _load(unet, renamed)


# ---------------------------------------------------------------------------------------------------- guided-diffusion


def convert_guided_diffusion(
    state: State,
    *,
    resolution: int,
    dropout: float = 0.0,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    new_attention_order: bool = False,
) -> UNet2DModel:
    """
    The network of OpenAI's guided-diffusion, unconditional, with convolutions or residual blocks that resample.

    A learned variance, the second half of the output, is left out: the predicted noise stays what it was.

    Args:
        num_heads, num_head_channels (`int`, *optional*): One of them is needed, as the network was made with.
        new_attention_order (`bool`): Whether q, k and v were split before the heads rather than after.
    """
    if "label_emb.weight" in state:
        raise ValueError(
            "checkpoint cannot be converted: it is conditioned on classes, but a purifier reads no labels."
        )
    num_blocks, num_levels, resnet_resampling = _guided_layout(state)
    down_index = [1 + level * (num_blocks + 1) for level in range(num_levels)]
    channels = [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in down_index]
    attention = {level for level, i in enumerate(down_index) if f"input_blocks.{i}.1.norm.weight" in state}
    width = state["input_blocks.0.0.weight"].shape[0]
    if width != channels[0] or state["time_embed.0.weight"].shape[1] != width:
        raise _refuse(f"its first level widens {state['time_embed.0.weight'].shape[1]} channels to {channels[0]}")
    scale_shift = state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * channels[-1]
    in_channels = state["input_blocks.0.0.weight"].shape[1]
    if state["out.2.weight"].shape[0] == 2 * in_channels:
        state = state | {name: state[name][:in_channels] for name in ("out.2.weight", "out.2.bias")}
    widths = {channels[level] for level in attention} | {channels[-1]}
    unet = UNet2DModel(
        sample_size=resolution,
        in_channels=in_channels,
        out_channels=in_channels,
        layers_per_block=num_blocks,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        attention_head_dim=_head_dim(widths, num_heads, num_head_channels),
        downsample_padding=1,
        downsample_type="resnet" if resnet_resampling else "conv",
        upsample_type="resnet" if resnet_resampling else "conv",
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        dropout=dropout,
        **(_levels(channels, attention, "Resnet", "sample") if resnet_resampling else _levels(channels, attention)),
    )
    places = _guided_places(num_blocks, num_levels)
    rules = [
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
        (r"(samplers\.0)\.op\.", r"\1.conv."),
    ]
    renamed = {}
    for name, tensor in state.items():
        name = _rename(_place(name, places), rules)
        if ".qkv." in name:
            heads = (
                1 if unet.config.attention_head_dim is None else tensor.shape[0] // 3 // unet.config.attention_head_dim
            )
            for letter, part in zip("qkv", _split_qkv(tensor, 1 if new_attention_order else heads)):
                renamed[name.replace("qkv", f"to_{letter}")] = part
        elif "attentions" in name:
            name = name.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.")
            renamed[name] = tensor[:, :, 0] if tensor.ndim == 3 else tensor
        else:
            renamed[name] = tensor
    return _load(unet, renamed)


def _guided_layout(state: State) -> tuple[int, int, bool]:
    """Residual blocks per level, levels, and whether residual blocks resample: read off the way up, which tells."""
    inputs, outputs = (
        len({match[1] for name in state if (match := re.match(rf"{way}_blocks\.(\d+)\.", name))})
        for way in ("input", "output")
    )
    if outputs == 0:
        raise _refuse("it has no blocks on the way up, as a classifier has none")
    # The last block of each level but the top one has a further part, which upsamples.
    ups = [
        int(match[1])
        for name in state
        if (match := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight$", name))
    ]
    num_blocks = min(ups) if ups else outputs - 1
    num_levels = outputs // (num_blocks + 1)
    if num_levels * (num_blocks + 1) != outputs or inputs != outputs:
        raise _refuse(
            f"its {inputs} blocks down and {outputs} up do not fall into levels that resample with convolutions"
        )
    return num_blocks, num_levels, any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", name) for name in state)


def _guided_places(num_blocks: int, num_levels: int) -> dict[str, str]:
    """Numbered blocks of guided-diffusion, and where diffusers has them; its resampling parts follow the attention."""
    places = {"input_blocks.0.0": "conv_in"}
    places |= {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    places["middle_block.1"] = "mid_block.attentions.0"
    for level in range(num_levels):
        for block in range(num_blocks + 1):
            here = f"input_blocks.{1 + level * (num_blocks + 1) + block}"
            if block < num_blocks:
                places[f"{here}.0"] = f"down_blocks.{level}.resnets.{block}"
                places[f"{here}.1"] = f"down_blocks.{level}.attentions.{block}"
            else:
                places[f"{here}.0"] = f"down_blocks.{level}.downsamplers.0"
            here = f"output_blocks.{level * (num_blocks + 1) + block}"
            places[f"{here}.0"] = f"up_blocks.{level}.resnets.{block}"
            places[f"{here}.1"] = f"up_blocks.{level}.attentions.{block}"
            places[f"{here}.2"] = f"up_blocks.{level}.upsamplers.0"
    return places


def _place(name: str, places: dict[str, str]) -> str:
    match = re.match(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.*)", name)
    if not match:
        return name
    place, rest = places[match[1]], match[2]
    # Without attention the upsampling part is the second rather than the third.
    if "attentions" in place and re.match(r"conv\.|in_layers|emb_layers|out_layers", rest):
        place = re.sub(r"attentions\.\d+", "upsamplers.0", place)
    return f"{place}.{rest}"


def _head_dim(widths: set[int], num_heads: int | None, num_head_channels: int | None) -> int | None:
    """Channels per head, which diffusers has one value of for the whole network; None is a single head everywhere."""
    for name, value in (("num_heads", num_heads), ("num_head_channels", num_head_channels)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if num_head_channels is not None:
        return num_head_channels
    if num_heads is None:
        raise ValueError(
            "num_heads is None, but the weights do not tell the number of attention heads: give --num_heads or "
            "--num_head_channels."
        )
    if num_heads == 1:
        return None
    if len(widths) > 1:
        raise _refuse(f"num_heads is {num_heads} at attention layers of {sorted(widths)} channels")
    return next(iter(widths)) // num_heads


def _split_qkv(tensor: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Weight (3C, C, 1) or bias (3C,) of one projection as those of three; rows are ordered by head, then q, k, v."""
    rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:2])
    return tuple(rows[:, part].reshape(-1, *tensor.shape[1:2]) for part in range(3))


if __name__ == "__main__":
    with ends_in_one_sentence("convert_checkpoint", "give the same command again with another --output_dir"):
        main(parse_args())
