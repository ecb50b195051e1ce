"""Images of the same seeds through a training, in the run folder and in TensorBoard."""

import hashlib

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.cli.run_folder import load_evaluation
from agents.cli.samples import _shrink, list_samples, remove_samples


def test_a_run_has_a_row_before_and_after(finished):
    samples = list_samples(finished / "samples")
    assert [(sample.iteration, sample.progress) for sample in samples] == [(0, "0 images"), (2, "4 images")]
    first, last = (np.asarray(Image.open(sample.path)) for sample in samples)
    assert first.shape == (64, 3 * 64, 3)
    assert not np.array_equal(first, last)
    # They are the images of the evaluation, which draws more of them side by side.
    before = load_evaluation(finished / "evaluation_before.npz").images
    assert abs(np.concatenate(before, axis=1).astype(int) - first).max() <= 1


def test_tensorboard_has_them(finished):
    events = EventAccumulator(str(finished / "tensorboard"), {"images": 0})
    events.Reload()
    shown = {name: events.Images(name) for name in events.Tags()["images"]}
    assert {name: [image.step for image in images] for name, images in shown.items()} == {
        "images of fixed seeds": [0, 2],
        "before after": [2],
        "held out": [2],
    }
    files = [sample.path for sample in list_samples(finished / "samples")] + [finished / "held_out.png"]
    images = [*shown["images of fixed seeds"], *shown["held out"]]
    for image, file in zip(images, files, strict=True):
        assert hashlib.sha256(image.encoded_image_string).digest() == hashlib.sha256(file.read_bytes()).digest()
        assert (image.width, image.height) == Image.open(file).size


def test_rows_that_a_resumed_run_draws_again_are_removed(tmp_path):
    names = ["00000-0-images.png", "00010-640-images.png", "00020-1280-images.png", "00023-1472-images.png", "mine.png"]
    for name in names:
        (tmp_path / name).touch()
    remove_samples(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[:2], "mine.png"]
    (tmp_path / "00030-50-steps.png").touch()
    assert list_samples(tmp_path)[-1].progress == "50 optimiser steps"
    remove_samples(tmp_path / "nothing", 20)


def test_large_images_are_shown_smaller():
    assert [image.shape for image in _shrink(np.zeros((2, 1024, 512, 3), np.uint8))] == [(256, 128, 3)] * 2
    small = np.zeros((1, 64, 64, 3), np.uint8)
    assert _shrink(small)[0].shape == (64, 64, 3)
