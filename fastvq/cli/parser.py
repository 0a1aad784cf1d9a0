"""Arguments of every command, and the help that teaches them."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq._version import __version__
from fastvq.cli.names import options_of
from fastvq.cli.options import (
    add_cache_images,
    add_data,
    add_drawing,
    add_dry_run,
    add_model,
    add_output,
    add_resume,
    add_run,
    add_schedule,
    add_shard,
    add_skip_broken,
    add_training,
    add_weights,
)

_OVERVIEW = """\
Hierarchical VQ-VAEs and priors over their codes.

A project is one folder, given as --run. The steps fill it from left to right:

  train-vqvae -> RUN/vqvae     an autoencoder that turns images into grids of codes
  extract     -> RUN/codes     the codes of all images (or import-codes, of another autoencoder)
  train-prior -> RUN/prior0    one prior per level, 0 is the top (coarsest) level
  sample      <- RUN           new images: codes from the priors, decoded once
  evaluate    <- RUN           likelihood, reconstruction, sample metrics (with train-classifier -> RUN/classifier)
"""

_EXAMPLES = """\
examples:
  fastvq demo                                          train on handwritten digits and look (minutes, on a CPU)
  fastvq sample --pretrained digits --label 7          sample a model that ships with fastvq
  fastvq inpaint --pretrained digits --image 7.png --box 0 16 32 16 --label 7
  fastvq train-vqvae --run my --data photos --preset photos64
  fastvq extract --run my
  fastvq train-prior --run my --level 0
  fastvq train-prior --run my --level 1
  fastvq plot my                                       curves of training, in my/curves.png
  fastvq sample --checkpoint my -n 16 --label 3 --out samples.png
  fastvq train-classifier --run my --steps 20000
  fastvq evaluate my --out my-report
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvq",
        description=_OVERVIEW,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastvq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train_vqvae(commands)
    _add_extract(commands)
    _add_import_codes(commands)
    _add_train_prior(commands)
    _add_sample(commands)
    _add_inpaint(commands)
    _add_merge(commands)
    _add_reconstruct(commands)
    _add_train_classifier(commands)
    _add_evaluate(commands)
    _add_plot(commands)
    _add_info(commands)
    for name, command in commands.choices.items():
        command.set_defaults(command=name, options=options_of(command))
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    handler: str,
    summary: str,
    text: str,
    *,
    device: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if device:
        parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "demo",
        "fastvq.cli.demo:demo",
        "train on handwritten digits, sample every class and write pictures",
        "Trains a 2-level VQVAE2 and both priors on scikit-learn's digits in a few minutes on two CPU cores, writes\n"
        "reconstructions.png and samples.png, and compares sampling as it is with sampling by its definition.",
    )
    parser.add_argument("--out", type=Path, default=Path("fastvq-demo"), help="project folder (default: fastvq-demo)")
    parser.add_argument("--label", type=int, help="sample only this digit (default: a column of each)")
    parser.add_argument("--seed", type=int, help="seed of training and sampling (default: 0)")
    parser.add_argument("--effort", type=float, help="multiplies the number of training steps (default: 1)")
    add_resume(parser)


def _add_train_vqvae(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train-vqvae",
        "fastvq.cli.train:train_vqvae",
        "train the autoencoder (stage 1)",
        "Writes RUN/vqvae: config.json, data.json, checkpoints/, logs/ (TensorBoard and metrics.jsonl), images/ and,\n"
        "at the end, model/.",
    )
    add_run(parser)
    parser.add_argument("--data", help="a folder of images (labels from sub-folders), or 'digits'")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="image size: one side, or height and width")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="image channels (default: the preset's)")
    add_skip_broken(parser)
    parser.add_argument("--flip", action="store_true", default=None, help="augmentation: mirror images at random")
    parser.add_argument("--shift", type=int, metavar="PIXELS", help="augmentation: shift images at random")
    parser.add_argument(
        "--no-draft",
        dest="draft",
        action="store_false",
        default=None,
        help="decode JPEG files of at least 4 times the image size in full; a new project decodes them at a part of "
        "their size, several times faster, with differences of a few of 255 levels (a project remembers it)",
    )
    add_cache_images(parser)
    add_training(parser, preset="photos64", kind="autoencoder", learning_rate=3e-4, batch_size=128)
    parser.add_argument("--validation", type=float, metavar="FRACTION", help="share held out (default: 0.1)")


def _add_extract(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "extract",
        "fastvq.cli.train:extract",
        "write the codes of all images",
        "Reads RUN/vqvae, writes RUN/codes/train and RUN/codes/validation. An interrupted run goes on when it is\n"
        "started again. With --shard one part of them goes to RUN/codes/parts; `fastvq merge RUN` puts all together.",
    )
    add_run(parser)
    add_shard(parser)
    parser.add_argument("--data", help="the image folder, if it has moved since training")
    add_skip_broken(parser)
    parser.add_argument(
        "--changed-data",
        action="store_true",
        help="go on with other images than the autoencoder was trained on; images that it knows stay held out or not "
        "as they were, and codes and priors of the images before must be moved away first",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--copies", type=int, default=1, help="augmented variants of each training image (default: 1, as it is)"
    )
    add_cache_images(parser)
    parser.add_argument(
        "--workers", type=int, help="threads that load images (default: 0 on a CPU, else by its number of cores)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_import_codes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "import-codes",
        "fastvq.cli.import_codes:import_codes",
        "take codes of another autoencoder",
        "In place of extract, for codes that another project made. SOURCE holds level0.npy (top, the coarsest), ...,\n"
        "each [N, h, w], and perhaps labels.npy, or codes.safetensors with tensors of these names; and codes.json\n"
        "with num_codes, and class_names or num_classes. Writes RUN/codes/train and RUN/codes/validation.",
        device=False,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of codes")
    add_run(parser)
    parser.add_argument(
        "--validation", type=float, default=0.1, metavar="FRACTION", help="share held out (default: 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out (default: 0)")


def _add_train_prior(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train-prior",
        "fastvq.cli.train:train_prior",
        "train the prior of one level (stage 2)",
        "Reads RUN/codes, writes RUN/priorLEVEL. Grid, number of codes, classes and condition are taken from the\n"
        "codes; the preset gives the architecture. Levels can be trained at the same time, or on other machines.",
    )
    add_run(parser)
    parser.add_argument("--level", type=int, required=True, help="0 is the top (coarsest) level")
    parser.add_argument("--unconditional", action="store_true", default=None, help="ignore the labels")
    parser.add_argument(
        "--code-init",
        choices=("codebooks", "random"),
        help="first weights of each code: as similar as the codes in the autoencoder's codebooks, which learns faster\n"
        "and generalises better (the default where there is an autoencoder and no --init-from), or random",
    )
    add_training(parser, preset=None, kind="prior", learning_rate=3e-4, batch_size=32)


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "sample",
        "fastvq.cli.generate:sample",
        "draw new images",
        "Sample i of a seed is the same whatever -n is. OUT ending in .png, .jpg, .jpeg or .webp gets one picture\n"
        "of all samples, with a column for each class; an OUT without an ending becomes a folder with one PNG per\n"
        "sample, their codes (codes.safetensors) and settings (samples.json). With --shard OUT is a folder that gets\n"
        "one part of the n samples, which `fastvq merge OUT` puts together; a part that was stopped goes on when it\n"
        "is started again. Samples that vary the details of an image: --like.",
    )
    add_model(parser)
    add_shard(parser)
    parser.add_argument(
        "--images",
        choices=("png", "tar"),
        help="with --shard: also write the images, as OUT/000123.png or as a tar of the part that webdataset reads",
    )
    parser.add_argument("-n", type=int, default=16, help="number of images (default: 16)")
    add_drawing(parser, seed_note="; --shard needs one")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="keep this image's codes of upper levels, and draw the others",
    )
    parser.add_argument(
        "--keep-levels", type=int, metavar="K", help="with --like: levels to keep, from the top (default: 1)"
    )
    parser.add_argument(
        "--animate",
        type=Path,
        metavar="FILE",
        help="also write an animated .gif, .png or .webp of the grids being filled; takes up to 60 decodings",
    )
    add_output(parser, "samples.png")


def _add_inpaint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "inpaint",
        "fastvq.cli.inpaint:inpaint",
        "paint a region of an image anew",
        "The image is turned upright, cropped at the centre and resized as in training. Codes of the region are drawn\n"
        "given those before them in raster order and those of the levels above, so a region is continued from above\n"
        "and from the left. OUT ending in .png, .jpg, .jpeg or .webp gets one picture: the image, what is kept of it,\n"
        "and the results. An OUT without an ending becomes a folder with one PNG per result, their codes\n"
        "(codes.safetensors) and settings (samples.json).",
    )
    add_model(parser)
    parser.add_argument("--image", type=Path, required=True, help="the image, of any size")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument(
        "--box",
        type=int,
        nargs=4,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="the region, in pixels of the (upright) image from its upper left corner",
    )
    region.add_argument(
        "--mask", type=Path, metavar="IMAGE", help="the region: white in this image of the same width and height"
    )
    parser.add_argument(
        "--margin", type=int, default=0, metavar="CELLS", help="codes around the region to draw as well (default: 0)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="times that the region is drawn, given what the round before drew around it (default: 2)",
    )
    parser.add_argument(
        "--no-paste", dest="paste", action="store_false", help="show the rest of the image as decoded, not as it was"
    )
    parser.add_argument("-n", type=int, default=8, help="number of results (default: 8)")
    add_drawing(parser)
    add_output(parser, "inpainted.png")


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "merge",
        "fastvq.cli.merge:merge",
        "put parts of samples or codes together",
        "FOLDER holds all parts that `fastvq sample --shard` wrote: their codes (codes.safetensors) and settings\n"
        "(samples.json) are written as one process writes them. Or it is a project with all parts that\n"
        "`fastvq extract --shard` wrote: they become FOLDER/codes/train and FOLDER/codes/validation.",
        device=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="parts of samples, or a project")
    parser.add_argument("--out", type=Path, help="where merged samples go (default: FOLDER)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was merged before")


def _add_reconstruct(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "reconstruct",
        "fastvq.cli.generate:reconstruct",
        "show images beside what their codes keep of them",
        "Writes a picture with the originals above and the reconstructions below, and prints the mean squared error\n"
        "in [-1, 1] pixel units.",
    )
    add_model(parser)
    parser.add_argument("--data", required=True, help="a folder of images, or 'digits'")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="image size (default: the training size)")
    add_skip_broken(parser)
    parser.add_argument("-n", type=int, default=16, help="number of images, spread over the classes (default: 16)")
    add_output(parser, "reconstructions.png")


def _add_train_classifier(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train-classifier",
        "fastvq.cli.classify:train_classifier",
        "train a classifier for sample metrics and rejection",
        "Reads the labelled images of the project (or of --data), writes RUN/classifier. `fastvq evaluate` takes its\n"
        "features, and its probabilities for rejection sampling. The images held out are the autoencoder's.",
    )
    add_run(parser)
    parser.add_argument("--name", default="classifier", help="run folder inside RUN (default: classifier)")
    add_data(parser)
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="image size (default: the project's)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="image channels (default: the project's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="channels=(32,64,128), features=64, dropout=0"
    )
    add_cache_images(parser)
    add_schedule(parser, learning_rate=2e-3, batch_size=64, weight_decay=0.01, ema=0.99)
    parser.add_argument("--seed", type=int, help="(default: the project's)")
    add_dry_run(parser)
    add_resume(parser)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "evaluate",
        "fastvq.cli.evaluate:evaluate",
        "measure a trained model",
        "Likelihood of the codes, reconstruction error and codebook use on training and validation images. With a\n"
        "classifier (RUN/classifier, or --classifier) also sample metrics in its features, nearest training images,\n"
        "the rejection curve, and the classification accuracy score. OUT receives a page (README.md, and report.html\n"
        "with the pictures inside), pictures and the numbers.\n"
        "Samples that `fastvq sample --shard` drew in parts are taken with --from-shards; with --shard as well, only\n"
        "the features of that part of them are gathered, for the evaluation that follows.",
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="a project folder or a saved pipeline")
    parser.add_argument("--pretrained", metavar="NAME", help="a model that ships with fastvq, such as digits")
    add_weights(parser)
    add_data(parser)
    parser.add_argument("-n", type=int, help="samples for the metrics (default: 10000)")
    parser.add_argument(
        "--temperature", type=float, nargs="+", metavar="T", help="one value, or one per level (default: 1)"
    )
    parser.add_argument(
        "--from-shards", type=Path, metavar="DIR", help="samples in parts, whose -n, --temperature and --seed count"
    )
    add_shard(parser)
    parser.add_argument("--classifier", type=Path, metavar="FOLDER", help="scores for rejection (default: RUN's)")
    parser.add_argument("--features", type=Path, metavar="FOLDER", help="another classifier, for the features")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="Inception weights for the features")
    parser.add_argument("--neighbours", type=int, default=3, metavar="K", help="of precision, recall, ... (default: 3)")
    parser.add_argument("--vectors", type=int, default=10_000, help="features kept of each set (default: 10000)")
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        metavar="FRACTION",
        help="points of the rejection curve (default: 1.0 0.9 ... 0.1)",
    )
    parser.add_argument(
        "--accuracy-steps", type=int, default=0, metavar="STEPS", help="train for the classification accuracy score"
    )
    parser.add_argument(
        "--classes-by",
        choices=("turn", "frequency"),
        default="turn",
        help="classes of samples: all in turn, or as often as the training images have them (default: turn)",
    )
    parser.add_argument("--seed", type=int, help="of samples and random selections (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--cache", type=Path, help="features of the training images (default: RUN/evaluation)")
    parser.add_argument("--out", type=Path, help="write a report to this folder")
    parser.add_argument("--no-curves", dest="curves", action="store_false", help="no picture of the rejection curve")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "plot",
        "fastvq.cli.plot:plot",
        "draw curves of training",
        "Of each run in a project, or of one run, whether or not it has finished: loss, error or likelihood in\n"
        "training and validation, perplexity of each level, and learning rate. Needs matplotlib (pip install\n"
        '"fastvq[eval]").',
        device=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a project, or one run of it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a PNG (default: RUN/curves.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "info",
        "fastvq.cli.describe:info",
        "describe a model, a preset, or this installation",
        "Without a model: what a report of a bug needs (versions, compiled extension, machine, which engines and\n"
        "backends can run and why others cannot), and presets with what they take.\n"
        "Of a preset, which is never built: parameters, grids of codes, recipe, the memory of training and sampling\n"
        "it, and with --train what the memory of training goes into.",
    )
    group = add_model(parser, required=False)
    group.add_argument("--preset", metavar="NAME", help="an architecture")
    parser.add_argument("--json", action="store_true", default=None, help="the installation, for programs to read")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the preset; repeatable"
    )
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="size of an autoencoder's images")
    parser.add_argument(
        "--train", action="store_true", default=None, help="the memory that each process takes in training"
    )
    parser.add_argument("--batch-size", type=int, help="images per step, of all processes (default: the recipe's)")
    parser.add_argument("--accumulate", type=int, metavar="PARTS", help="parts in which each step is computed")
    parser.add_argument("--bf16", action="store_true", default=None, help="bfloat16 autocast")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="weight averaging; 0: off (default: on)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that train together (default: 1)")
