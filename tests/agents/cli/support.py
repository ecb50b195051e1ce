"""What the tests of the command line share: short runs, and a look at the texts of figures."""

import itertools
import json

from matplotlib.backends.backend_agg import FigureCanvasAgg

from agents.cli.main import main

#: Options of a run that takes a second.
TINY = ["--num-inference-steps", "2", "--images-per-iteration", "2", "--lora-rank", "2", "--eval-images", "3"]
TINY += ["--device", "cpu"]
#: Trains fewer layers, which is faster.
FEW_LAYERS = ["--target-modules", "attention"]
#: Files and folders that every finished run has beside its checkpoints.
WRITTEN = {
    "config.yaml",
    "progress.csv",
    "tensorboard",
    "learning_curve.png",
    "evaluation_before.npz",
    "before_after.png",
    "held_out.png",
    "index.html",
    "lora",
    "samples",
    "summary.json",
}


class Brightness:
    """A reward with a gradient."""

    differentiable = True

    def score(self, images, prompts):
        return images.mean((1, 2, 3))

    __call__ = score


def train(folder, *options):
    """Runs ``dpok train``; returns its exit code."""
    return main(["train", "--out", str(folder), *options])


def read_summary(folder):
    """Returns a run's summary."""
    return json.loads((folder / "summary.json").read_text())


def sample(folder, lora, *options):
    """Runs ``dpok sample``; returns its exit code, and the file that it writes."""
    out = folder / "sample.png"
    words = ["sample", "--prompt", "a red circle", "--lora", str(lora), "--n", "2", "--out", str(out)]
    return main([*words, "--num-inference-steps", "2", "--device", "cpu", *options]), out


def list_written(folder):
    """Returns the names of a run's files and folders without its checkpoints."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}


def check_texts(figure):
    """Asserts that no text runs into another one or out of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # a legend finds its place when it is drawn
    renderer = canvas.get_renderer()
    texts = []
    for axes in figure.axes:
        if axes.get_visible():
            texts += [axes.title, *axes.texts]
    texts += figure.texts
    for legend in figure.legends:
        texts += legend.get_texts()
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    inside = figure.bbox
    for box in boxes:
        assert box.x0 >= inside.x0
        assert box.x1 <= inside.x1
        assert box.y0 >= inside.y0
        assert box.y1 <= inside.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
