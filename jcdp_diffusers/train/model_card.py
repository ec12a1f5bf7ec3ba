"""A purifier's model card, made from records alone."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .record import read_record


# A link to model_card.md at the top of the repository, which documents its variables.
TEMPLATE = Path(__file__).with_name("model_card.md")


def purifier_card(
    record: dict, *, repo_id: str, license: str | None = None, results: Sequence[dict] = ()
) -> ModelCard:
    """
    The card of a trained purifier.

    Args:
        record (`dict`): Content of `training_record.json`.
        repo_id (`str`): The repository's name on the Hub, or its folder's.
        license (`str`, *optional*): Identifier of the licence, as the Hub spells it; it depends on the images, too.
        results (`Sequence[dict]`): Records (`results.read_records`) to quote under "Measured".
    """
    name = repo_id.split("/")[-1]
    data = record["data"]
    validation = record["validation"]
    whole = record["trained_timesteps"] == [0, record["num_train_timesteps"]]
    generates = whole and not record["settings"].get("noise_corner")
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        license=license,
        base_model=record["base_model"] if record["base_model_on_hub"] else None,
        datasets=[data["hub_id"]] if data.get("hub_id") else None,
        tags=["ddpm", "purification", "unlearnable-examples", "jcdp-diffusers"],
        model_name=name,
        eval_results=[_held_out_result(data, validation[-1])] if validation else None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=repo_id,
        record=record,
        generates=generates,
        first_held_out=validation[0] if validation else None,
        held_out=validation[-1] if validation else None,
        results=list(results),
    )


def _held_out_result(data: dict, entry: dict) -> EvalResult:
    first, end = entry["timesteps"]
    source = data.get("source") or "images"
    return EvalResult(
        task_type="image-to-image",
        task_name="Denoising",
        dataset_type=data.get("hub_id") or "imagefolder",
        dataset_name=f"{Path(source).name}, {data['num_validation_images']} held-out images",
        metric_type="mse",
        metric_name=f"denoising loss at timesteps {first} to {end - 1}",
        metric_value=round(entry["loss"], 6),
    )


def write_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    results: Sequence[dict] = (),
) -> Path:
    """
    Write `README.md` from the `training_record.json` of a repository's folder; returns its path.

    Args:
        folder (`str` or `os.PathLike`): What `train_purifier` wrote.
        repo_id (`str`, *optional*): The folder's name by default.

    Other arguments as in [`purifier_card`].

    Raises:
        ValueError: If the record is damaged; the sentence names the file.
    """
    folder = Path(folder)
    record = read_record(folder)
    card = purifier_card(record, repo_id=repo_id or folder.resolve().name, license=license, results=results)
    card.save(folder / "README.md")
    return folder / "README.md"
