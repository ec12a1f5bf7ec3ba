"""Scores against a plain loop over images."""

import copy

import numpy as np
import pytest
import torch
from digits import as_tensors, weights

from jcdp_diffusers.victims import confusion_matrix, predict


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_equals_a_plain_loop(result, test, training):
    model = copy.deepcopy(result.model).train(training)
    images, labels = as_tensors(test)
    reference, confusion = [], np.zeros((10, 10), dtype=np.int64)
    for image, label in zip(images, labels.tolist()):
        logits = result.model(image[None] / 255)[0].detach()
        reference.append(logits)
        confusion[label, logits.argmax()] += 1
    before = weights(model)
    torch.testing.assert_close(predict(model, images, batch_size=33), torch.stack(reference), rtol=1e-4, atol=1e-5)
    assert np.array_equal(confusion_matrix(model, images, labels, 10), confusion)
    assert model.training == training and torch.equal(weights(model), before)


def test_bfloat16_scores_as_float32(result, test):
    images, labels = as_tensors(test)
    exact, rounded = predict(result.model, images), predict(result.model, images, bfloat16=True)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.1
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.95
