"""What the benchmarks of training steps share: a model, batches, processes, and both kinds of runs.

A random Llama of about 40 million parameters, LoRA rank 8 on all linear layers, float32; batches of
preference pairs as token ids, (prompt, chosen, rejected). Every contender runs in a process of its own
on the very same batches, of which the first one warms up. Knows no contender.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
# The same in small, for tests of the benchmarks themselves.
TINY = {
    **SHAPE,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
# What the system counts a process's memory in: bytes on macOS, kilobytes on Linux.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
# Passes over a pack: a step with frozen weights computes the activations and their gradients.
TRAINING, SCORING = 2, 1


class Measured(NamedTuple):
    """Seconds of each measured step, the peak of MLX's memory, and the work of these steps.

    `work` is in multiplications by weights (see `Weights.work`), over all passes.
    """

    seconds: list[float]
    peak: int
    work: int


# -- the command, and its processes ------------------------------------------------------------------


def make_parser(description: str, batch_size: int) -> argparse.ArgumentParser:
    """The arguments of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="transcript pairs (HH format); default: made-up lengths")
    parser.add_argument("--steps", type=int, default=8, help="measured steps (one more warms up)")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--pack-length", type=int, default=None, help="default: the command's default"
    )
    parser.add_argument(
        "--sorted", action="store_true",
        help="batches of neighbours in length, as mlx-lm-lora forms them; default: random batches",
    )  # fmt: skip
    parser.add_argument("--only", help="run one contender (a part of its name)")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def compare(contenders, args, show, prepare=None) -> dict:
    """What every wanted contender gives, by name; `show(name, found)` is called as it comes in.

    `prepare(folder, args)` writes what they all work with; by default a model and batches of pairs.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (prepare or prepare_pairs)(folder, args)
        for name in contenders:
            if args.only and args.only not in name:
                continue
            found = run_child(name, folder)
            if found:
                results[name] = found
                show(name, found)
    return results


def run_child(name, folder):
    """Call the command itself again, as the process of one contender; its last line is the result."""
    command = [sys.executable, *sys.argv, "--child", name, str(folder)]
    environment = {**os.environ, "MLX_ALIGN_CACHE": str(folder / f"cache {name}")}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if Path(OPENBLAS).exists():
        environment.setdefault("LD_PRELOAD", OPENBLAS)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name}: failed", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict) -> None:
    """Hand a child's result to the process that called it."""
    print(json.dumps(found))


def report_missing(module: str) -> bool:
    """Say that a peer cannot take part, where it is not installed."""
    missing = importlib.util.find_spec(module) is None
    if missing:
        report({"skipped": "not installed"})
    return missing


def read_batches(folder: Path) -> list:
    """The batches that were prepared: lists of (prompt, completion, completion, ...) as ids."""
    return json.loads((folder / "batches.json").read_text())


def summary(measured: Measured, tokens: list[int]) -> dict:
    """What a child reports; `tokens` are those of each measured step, as a user counts them."""
    rates = [t / s for t, s in zip(tokens, measured.seconds, strict=True)]
    return {
        "seconds_per_step": sum(measured.seconds) / len(measured.seconds),
        "tokens_per_second": sum(tokens) / sum(measured.seconds),
        "median_tokens_per_second": statistics.median(rates),
        "peak_gb": measured.peak / 1e9,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9,
    }


# -- the model and the batches -----------------------------------------------------------------------


def prepare_pairs(folder, args):
    """The model and the batches of pairs, the same for all."""
    texts = read_texts(args.data) if args.data else None
    words = make_model(folder, args, texts)
    rng = random.Random(0)
    pairs = tokenise(folder, texts, args) if texts else made_up(rng, words)
    batches = make_batches(pairs, rng, args)
    (folder / "batches.json").write_text(json.dumps(batches))
    measured = [p for batch in batches[1:] for p in batch]
    packed = sum(len(p) + len(c) + len(r) for p, c, r in measured)
    print(
        f"batches of {args.batch_size} pairs: {len(batches) - 1}, {pair_tokens(measured)} tokens, "
        f"{packed} with prompts shared",
        flush=True,
    )


def make_model(folder, args, texts=None) -> int:
    """The random model with its tokenizer, trained on `texts` if there are any; how many words it has."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    shape = TINY if args.tiny else SHAPE
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(shape))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(shape))
    print(f"{sum(w.size for w in weights.values()) / 1e6:.1f} M parameters")
    make_tokenizer(folder, texts, shape["vocab_size"])
    return shape["vocab_size"]


def make_batches(pairs, rng, args):
    """Random batches, or batches of neighbours in length in random order; one more than measured."""
    rng.shuffle(pairs)
    if args.sorted:
        pairs.sort(key=lambda p: len(p[0]) + len(p[1]))
    batches = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    batches = [b for b in batches if len(b) == args.batch_size]
    rng.shuffle(batches)
    if len(batches) < 2:
        sys.exit(f"{len(pairs)} pairs are too few for two batches of {args.batch_size}")
    return batches[: args.steps + 1]


def pair_tokens(pairs) -> int:
    """Tokens as a user counts them: every completion with its prompt."""
    return sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)


def read_texts(path):
    """Prompt, chosen and rejected text of all usable rows of a file."""
    from mlx_align.data.jsonl import read_rows
    from mlx_align.data.records import Unfit, parse_record

    records = []
    for origin, row in read_rows(Path(path)):
        try:
            records.append(parse_record(row, origin))
        except Unfit:
            continue
    return [(r.prompt, r.chosen, r.rejected) for r in records]


def make_tokenizer(folder, texts, words):
    """A byte-level BPE of so many words trained on the data itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    lines = (t for row in texts for t in row) if texts else ["hello world"]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


def tokenise(folder, texts, args):
    """The pairs that fit the length limit, as token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = []
    for row in texts:
        prompt, chosen, rejected = (tokenizer.encode(t).ids for t in row)
        chosen, rejected = chosen + [0], rejected + [0]
        if len(prompt) + max(len(chosen), len(rejected)) <= args.max_length:
            pairs.append((prompt, chosen, rejected))
    return pairs


def made_up(rng, words):
    """Lengths like HH's: log-normal prompts of about 130 tokens, completions of about 55."""

    def ids(mean, low, high):
        length = int(min(max(rng.lognormvariate(mean, 0.7), low), high))
        return [rng.randrange(1, words) for _ in range(length)]

    return [(ids(4.9, 16, 300), ids(4.0, 8, 200), ids(4.0, 8, 200)) for _ in range(500)]


class Weights(NamedTuple):
    """How many weights a token is multiplied by in the blocks, and in the head."""

    blocks: int
    head: int

    @classmethod
    def of(cls, shape) -> "Weights":
        """Those of a Llama's config."""
        width, heads = shape["hidden_size"], shape["num_attention_heads"]
        attention = 2 * width * (width + width * shape["num_key_value_heads"] // heads)
        block = attention + 3 * width * shape["intermediate_size"]
        return cls(block * shape["num_hidden_layers"], width * shape["vocab_size"])

    def work(self, tokens: int, scored: int) -> int:
        """Multiplications of one pass over `tokens`, of which `scored` go through the head."""
        return tokens * self.blocks + scored * self.head


def read_weights(folder: Path) -> Weights:
    """Those of the model that `make_model` wrote."""
    return Weights.of(json.loads((folder / "config.json").read_text()))


# -- our steps ---------------------------------------------------------------------------------------


def example(prompt, *completions, values=()):
    """One example with every token of its completions scored."""
    import numpy as np

    from mlx_align.data.template import make_example

    masks = [np.ones(len(ids), bool) for ids in completions]
    return make_example(prompt, completions, masks, "bench", values)


def pair_examples(batches) -> list:
    """Batches of pairs as batches of examples."""
    return [[example(*pair) for pair in batch] for batch in batches]


class Ours:
    """Our step as `train.loop` makes it, on the model in a folder."""

    def __init__(self, folder, method, pack_length=None, partners=None, *, checkpointing=False):
        """`partners` are the mismatched examples by uid, for methods that ask for them."""
        from mlx_align.model.adapter import AdapterSettings, wear_adapter
        from mlx_align.model.forward import choose_layout
        from mlx_align.model.heads import attach_reward_head
        from mlx_align.model.load import load_model
        from mlx_align.model.recompute import checkpoint_blocks
        from mlx_align.train.optimizer import Optimizer

        self.method, self.pack_length, self.partners = method, pack_length, partners or {}
        self.weights, self.loaded = read_weights(folder), load_model(str(folder))
        choose_layout(self.loaded)
        if method.reads == "rewards":
            attach_reward_head(self.loaded.model, self.loaded.head, seed=0)
        self.adapter = wear_adapter(self.loaded.model, AdapterSettings(), seed=0)
        if checkpointing:
            checkpoint_blocks(self.loaded.model)
        self.optimizer = Optimizer(0.0, 1.0)

    def measure(self, batches, *, first: bool) -> Measured:
        """Steps on batches of examples; with `first` the reference's pass is part of them."""
        import mlx.core as mx

        # The cache on disk is filled before, or by, what is timed.
        self.step(batches[0], self.reference(batches[0]))
        known = {} if first else {k: v for b in batches for k, v in self.reference(b).items()}
        mx.clear_cache()
        mx.reset_peak_memory()
        seconds, work = [], 0
        for batch in batches[1:]:
            started = time.perf_counter()
            parts, mismatched = self.step(batch, self.reference(batch) if first else known)
            seconds.append(time.perf_counter() - started)
            work += TRAINING * self._work(parts) + SCORING * self._work(mismatched)
            if first and self.method.uses_reference:
                work += SCORING * self._work(parts + mismatched)
        return Measured(seconds, mx.get_peak_memory(), work)

    def reference(self, batch) -> dict:
        """The reference's log-probabilities of a batch and its partners; from disk where known."""
        from mlx_align.train.reference import reference_log_probs

        if not self.method.uses_reference:
            return {}
        self.loaded.model.eval()
        batch = [*batch, *self._partners(batch)]
        return reference_log_probs(self.loaded, self.adapter, batch, self.pack_length)

    def step(self, batch, log_probs):
        """One optimizer step; returns its parts, and the mismatched ones."""
        from mlx_align.train.step import survey, train_step

        parts = self._parts(batch, log_probs)
        mismatched = self._parts(self._partners(batch), log_probs)
        self.loaded.model.eval()
        whole, _ = survey(self.loaded, self.method, parts, mismatched)
        self.loaded.model.train()
        train_step(self.loaded, self.adapter, self.optimizer, self.method, parts, 1e-4, whole)
        return parts, mismatched

    def _partners(self, batch):
        return [self.partners[e.uid] for e in batch if e.uid in self.partners]

    def _parts(self, examples, log_probs):
        from mlx_align.model.forward import make_batches
        from mlx_align.train.step import Part

        prompts = self.method.scores_prompts
        packs = make_batches(self.loaded, examples, self.pack_length, prompts=prompts)
        if not self.method.uses_reference:
            return [Part(pack) for pack in packs]
        return [Part(pack, pack.join(log_probs)) for pack in packs]

    def _work(self, parts) -> int:
        # A reward is one product; nothing goes through the vocabulary head.
        scored = 0 if self.method.reads == "rewards" else 1
        packs = [part.batch for part in parts]
        return sum(self.weights.work(p.tokens.size, scored * p.target.size) for p in packs)


# -- other tools' steps ------------------------------------------------------------------------------


def peer_pairs(batches) -> list[dict]:
    """Rows as mlx-lm-lora's trainers of pairs take them."""
    return [
        {
            "chosen": p + c,
            "rejected": p + r,
            "chosen_prompt_length": len(p),
            "rejected_prompt_length": len(p),
        }
        for batch in batches
        for p, c, r in batch
    ]


class Peer:
    """The steps of another tool's trainer, on the model in a folder."""

    def __init__(self, folder, rows, size):
        """`rows` in the order of our batches of `size`, of which the first one warms up."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        _pretend_metal()
        self.folder, self.rows, self.size = folder, rows, size
        self.weights = read_weights(folder)
        self.model = self.load()
        lora = {"rank": 8, "scale": 2.0, "dropout": 0.0}
        linear_to_lora_layers(self.model, len(self.model.layers), lora)
        self.model.train()
        self.times, self.shapes = [], []

    def load(self):
        """A frozen copy of the model."""
        from mlx_lm.utils import load_model

        model, _ = load_model(self.folder)
        model.freeze()
        return model

    def in_order(self, make):
        """Its own batches, made by `make` from our rows in the order of ours.

        The order is kept here: some trainers begin to iterate anew at every step.
        """
        starts = itertools.cycle(range(0, len(self.rows), self.size))

        def iterate(dataset, batch_size, max_seq_length, **_):
            for start in starts:
                rows = self.rows[start : start + self.size]
                batch = next(make(rows, batch_size, max_seq_length))
                self.shapes.append(batch[0].shape)
                yield batch

        return iterate

    def settings(self, settings_class, max_length, **others):
        """The arguments of its trainer: a report every step, nothing evaluated or saved meanwhile."""
        return settings_class(
            batch_size=self.size,
            iters=len(self.rows) // self.size,
            val_batches=0,
            steps_per_report=1,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            max_seq_length=max_length,
            adapter_file=str(self.folder / "peer.safetensors"),
            **others,
        )

    def measure(self, train, passes: int) -> Measured:
        """Run `train(callback)`; `passes` over the batch and its `rows` are what a step computes."""
        import mlx.core as mx

        with open(os.devnull, "w") as quiet:
            output, sys.stdout = sys.stdout, quiet
            try:
                train(self._clock())
            finally:
                sys.stdout = output
        seconds = [b - a for a, b in itertools.pairwise(self.times)]
        tokens = sum(rows * (width - 1) for rows, width in self.shapes[1 : len(seconds) + 1])
        work = passes * self.weights.work(tokens, tokens)
        return Measured(seconds, mx.get_peak_memory(), work)

    def _clock(self):
        import mlx.core as mx
        from mlx_lm.tuner.callbacks import TrainingCallback

        times = self.times

        class Clock(TrainingCallback):
            def on_train_loss_report(self, info):
                times.append(time.perf_counter())
                if len(times) == 1:
                    mx.clear_cache()
                    mx.reset_peak_memory()

        return Clock()


def _pretend_metal():
    """mlx-lm-lora asks for a working set that only Metal reports."""
    import mlx.core as mx

    if "max_recommended_working_set_size" not in mx.device_info():
        device_info = mx.device_info()
        mx.device_info = lambda: {**device_info, "max_recommended_working_set_size": 16 * 2**30}
        mx.set_wired_limit = lambda limit: 0


def measure_peer_dpo(folder, batches, max_length, *, checkpointing=False) -> Measured:
    """mlx-lm-lora's DPO, whose reference is computed again at every step."""
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer import dpo_trainer

    peer = Peer(folder, peer_pairs(batches), len(batches[0]))
    dpo_trainer.iterate_dpo_batches = peer.in_order(dpo_trainer.iterate_dpo_batches)
    settings = peer.settings(
        dpo_trainer.DPOTrainingArgs, max_length, grad_checkpoint=checkpointing, beta=0.1
    )

    def train(clock):
        reference, optimizer = peer.load(), optim.AdamW(1e-4)
        dpo_trainer.train_dpo(
            peer.model, reference, optimizer, peer.rows, None, settings, training_callback=clock
        )

    return peer.measure(train, 2 * (TRAINING + SCORING))
