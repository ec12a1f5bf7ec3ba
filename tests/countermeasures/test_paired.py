"""A purifier that has seen pairs: what it takes off, and pairs that cannot be."""

import dataclasses

import numpy as np
import pytest
import torch

from jcdp_diffusers import countermeasures, poisons
from jcdp_diffusers.countermeasures import make_pairs, paired
from jcdp_diffusers.data.perturbations import apply_perturbation


def protect(data):
    return data.with_images(
        apply_perturbation(data.images, poisons.get("lsp")(data.tensor(), torch.from_numpy(data.labels)))
    )


def test_takes_most_of_a_poison_out_of_images_that_it_has_not_seen(train, others, monkeypatch):
    """The same tool with the same seed, on other digits."""
    settings = paired.PairedSettings(unet="tiny32", epochs=4, batch_size=16, learning_rate=3e-3, bfloat16=False)
    monkeypatch.setitem(paired.SETTINGS, "paired-small", settings)
    pairs = make_pairs(protect(others), others)
    train = train.subset(range(40))
    protected = protect(train)
    cleaned = countermeasures.get("paired-small").prepare(protected, pairs=pairs).data
    power = lambda data: np.square(data.images.astype(float) - train.images).mean()
    assert power(cleaned) < 0.8 * power(protected) and cleaned.ids == train.ids


def test_the_network_is_kept_and_not_used_for_other_pairs(train, pairs_like, tmp_path):
    measure = countermeasures.get("paired-small")
    options = {"pairs": pairs_like(train), "checkpoint_dir": tmp_path}
    one = measure.prepare(train, **options).data.images
    assert (tmp_path / "paired-small-0/paired.json").exists()
    assert np.array_equal(measure.prepare(train, **options).data.images, one)
    other_pairs = pairs_like(train)._replace(protected=protect(pairs_like(train).originals))
    with pytest.raises(ValueError, match="folder is .*same pairs"):
        measure.prepare(train, pairs=other_pairs, checkpoint_dir=tmp_path)


def test_pairs_of_another_shape(train, pairs_like):
    with pytest.raises(ValueError, match="pairs has images of 16x16x1.*16x16x3"):
        countermeasures.get("paired").prepare(train, pairs=pairs_like(train.with_images(train.images[..., :1])))


def test_pairs_are_joined_by_id_and_checked(train):
    protected = protect(train)
    backwards = train.subset(range(len(train))[::-1])
    assert np.array_equal(make_pairs(protected, backwards).originals.images, train.images)
    with pytest.raises(ValueError, match="pairs: clean lacks the originals of 10 of 160"):
        make_pairs(protected, train.subset(range(150)))
    with pytest.raises(ValueError, match="pairs has protected images that are their originals"):
        make_pairs(train, train)
    renamed = dataclasses.replace(train, ids=train.ids[1:] + train.ids[:1], labels=None)
    with pytest.raises(ValueError, match="pairs: .*do not resemble"):
        make_pairs(protected, renamed)


def test_a_command_gives_pairs_where_they_are_needed_and_nowhere_else(train):
    needs, plain = countermeasures.get("paired"), countermeasures.get("gray")
    protected = protect(train)
    assert len(needs.pairs_of(protected, train).originals) == 160 and plain.pairs_of(None, train) is None
    with pytest.raises(ValueError, match="collected_protected is None.*'paired'"):
        needs.pairs_of(None, train)
    with pytest.raises(ValueError, match="collected is None.*'paired'"):
        needs.pairs_of(protected, None)
    with pytest.raises(ValueError, match="collected_protected has 160 images.*'gray'"):
        plain.pairs_of(protected, train)
