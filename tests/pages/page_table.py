"""What the blocks of each page need, give and print, and which are not run, and why.

A page that is not named here is run all the same: its Python as it stands, in order, in one namespace; its commands are
checked (`page_shell`). To move a block to another page is to move its entry here.
"""

from __future__ import annotations

import page_checks as checks
import page_setups as setups
from page_blocks import Entry, Page

from fastvq.errors import AccelerationWarning

_EXPLAINED = ("levels per position", "FLOP", "of weights", "memory", "times less")

FIRST_STEPS = Entry(
    "fastvq.sample(my_prior",
    before=setups.own_models,
    gives={
        "out": lambda out: [grid.shape for grid in out.codes] == [(9, 8, 8), (9, 16, 16)],
        "varied": lambda varied: varied.images.shape == (9, 3, 64, 64),
        "top": lambda top: top.shape == (100, 8, 8),
        "codes": lambda codes: codes.shape == (8, 32, 32) and codes.unique().numel() > 100,
        "model": checks.is_accelerated,
    },
)
PRESETS = Entry(
    "VQVAE2.from_preset",
    gives={
        "logits": lambda logits: logits.shape == (2, 512, 32, 32),
        "loss": lambda loss: loss.shape == () and bool(loss > 0),
    },
)
EXPLAIN = Entry("fastvq.explain(prior)", prints=_EXPLAINED)
QUANTISERS = Entry(
    "VectorQuantizer(512, 64",
    gives={
        "out": lambda out: out.codes.shape == (8, 32, 32),
        "indices": lambda indices: indices.shape == (65536,),
        "counts": lambda counts: int(counts.sum()) == 65536,
    },
)
CAUSAL = Entry(
    "causal_attention(query",
    gives={
        "y": lambda y: y.shape == (8, 256, 32, 32),
        "found": lambda found: found.shape == (8, 4, 1024, 64),
    },
)
CHECKPOINTS = Entry(
    "their_pixelsnail",
    before=setups.models_of_the_port,
    gives={
        "codes": lambda codes: codes.shape == (8, 4, 6),
        "prior": lambda prior: type(prior).__name__ == "PixelCNN",
        "vqvae": lambda vqvae: type(vqvae).__name__ == "VQVAE2",
    },
)
OWN_IMAGES = Entry("--run my --data photos", before=setups.photographs, runs=setups.SMALL)

KNOWN: dict[str, Page] = {
    "README.md": Page((FIRST_STEPS,), after=checks.first_steps),
    "docs/accelerate.md": Page(
        (
            Entry(
                "VectorQuantize(dim=64, codebook_size=512, accept_image_fmap=True)",
                warns=(AccelerationWarning, "random .*stochastic_sample_codes"),
                gives={"x": lambda x: x.grad is not None},
            ),
            Entry("module          kind", shows=True),
        ),
        packages=("vector_quantize_pytorch",),
    ),
    "docs/causal-operations.md": Page((CAUSAL,)),
    "docs/checkpoints.md": Page((CHECKPOINTS,)),
    "docs/evaluation.md": Page(
        (
            Entry("FeatureExtractor(my_network", before=setups.own_features),
            Entry("threshold=0.99", before=setups.judge),
            Entry("score_shard(pipeline", before=setups.drawn_in_parts),
        ),
        after=checks.evaluation,
    ),
    "docs/migrating-from-vector-quantize-pytorch.md": Page(
        (
            Entry(
                "vectors = ours.lookup(indices)",
                gives={
                    "quantized": lambda quantized: quantized.shape == (2, 64, 8, 8),
                    "vectors": lambda vectors: vectors.shape == (2, 64, 8, 8),
                    "loss": lambda loss: loss.requires_grad,
                },
            ),
            Entry("FSQ([8, 5, 5, 5]", gives={"quantizer": lambda quantizer: type(quantizer).__name__ == "LFQ"}),
        ),
        packages=("vector_quantize_pytorch",),
    ),
    "docs/own-autoencoders.md": Page(runs={}, after=checks.own_autoencoders),
    "docs/own-images.md": Page((OWN_IMAGES,), after=checks.own_images),
    "docs/own-priors.md": Page(after=checks.own_priors),
    "docs/presets.md": Page((PRESETS,)),
    "docs/quantisers.md": Page((QUANTISERS,)),
    "docs/sampling.md": Page(
        (
            Entry(
                "digits.sample(8",
                gives={
                    "out": lambda out: out.images.shape == (8, 1, 32, 32),
                    "top": lambda top: top.shape == (8, 2, 2),
                    "bottom": lambda bottom: bottom.shape == (8, 4, 4),
                    "drawn": lambda drawn: drawn.shape == (8, 4, 4),
                },
            ),
            EXPLAIN,
        ),
        after=checks.sampling,
    ),
    "docs/several-processes.md": Page(
        (Entry("fastvq info --preset imagenet256-top --train", runs={}),), packages=("distributed",)
    ),
    "docs/tutorial.md": Page((Entry("train_vqvae(pictures", before=setups.few_steps),), after=checks.tutorial),
    "docs/using-models.md": Page(runs={}, after=checks.using_models),
}

# Blocks that are not run: a part of each, and why.
BLOCKS_NOT_RUN: dict[str, dict[str, str]] = {
    "docs/presets.md": {
        "nothing was written (--dry-run)": "needs the emoji pictures; tests/cli/test_summary.py holds such a summary",
    },
    "docs/several-processes.md": {
        "#SBATCH": "needs SLURM; its commands are parsed by tests/pages/test_several_processes.py",
        "for part in 0 1 2 3": "run, with fewer parts, by tests/pages/test_several_processes.py",
        "sbatch --parsable": "needs SLURM; its commands are parsed by tests/pages/test_several_processes.py",
        "srun --ntasks=8": "needs SLURM; its commands are parsed by tests/pages/test_several_processes.py",
        "ray.remote": "needs Ray, which no extra installs",
    },
    "docs/watching-a-run.md": {
        "step 12/24": "a line of a run; tests/training/test_progress.py holds its form",
        "validation at step 400": "lines of a run; tests/training/test_progress.py holds their form",
        "few codes in use in validation": "a warning; tests/cli/test_watching_cli.py holds its words",
    },
}

# Commands that are not checked, in blocks whose other commands are: a part of each, and why.
COMMANDS_NOT_CHECKED: dict[str, dict[str, str]] = {
    "CONTRIBUTING.md": {
        "python3.11 -m venv": "makes an environment",
        ". .venv/bin/activate": "makes an environment",
    },
    "docs/benchmarks.md": {"git switch": "takes a change that is not there"},
    "docs/emoji/README.md": {
        "train_priors.py": "run by tests/data/test_emoji_training.py",
        "apt-get install": "installs packages of the system",
        "extract_emoji.py": "run by tests/data/test_emoji_script.py",
    },
    "docs/releasing.md": {
        "python -m build": "a tool of the release, which no extra installs",
        "auditwheel": "a tool of the release, which no extra installs",
        "check-wheel-contents": "a tool of the release, which no extra installs",
        "cibuildwheel": "a tool of the release, which needs Docker",
        "twine": "a tool of the release, which no extra installs",
    },
}
