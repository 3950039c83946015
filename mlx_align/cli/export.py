"""The command that takes a model elsewhere."""

import click

from mlx_align.cli.console import open_console
from mlx_align.cli.options import (
    SettingsCommand,
    base_option,
    option,
)

TARGETS = ("mlx", "hf", "peft", "gguf", "ollama", "lmstudio")
GGUF_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1",
    "q4_0", "q3_k_m", "q2_k",
)  # fmt: skip
MLX_TYPES = ("8bit", "6bit", "5bit", "4bit", "3bit")


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_export()]


def form(values: dict) -> dict:
    """What `api.export_model` is told besides the source and for which program."""
    options = {name: value for name, value in values.items() if name not in ("source", "to")}
    options["base"] = options.pop("model")
    return options


def _export() -> click.Command:
    def run(**values):
        from mlx_align import api

        open_console()
        path = api.export_model(values["source"], values["to"], **form(values))
        click.echo(f"written: {path}")

    return SettingsCommand(
        "export",
        callback=run,
        params=[
            click.Argument(["source"], metavar="RUN_OR_MODEL"),
            option(
                "--to",
                type=click.Choice(TARGETS),
                required=True,
                help="mlx: folder for mlx-lm; hf: folder for transformers; peft: the adapter alone, for "
                "PEFT; gguf: file for llama.cpp; ollama: GGUF and Modelfile, and the model in Ollama "
                "where that is here; lmstudio: the model where LM Studio finds it.",
            ),
            option(
                "--adapter-only",
                is_flag=True,
                help="Write the adapter without its base: for mlx-lm (mlx), PEFT (hf), llama.cpp's --lora "
                "(gguf) or a base that Ollama has (ollama).",
            ),
            option(
                "--base-name",
                help="What the base is called there, with --adapter-only: a Hub id or folder for PEFT, a "
                "model of Ollama's (llama3.2:1b).",
            ),
            option("--output", help="Where to write. Default: in the run folder, under export/."),
            option(
                "--quantize",
                type=click.Choice(GGUF_TYPES + MLX_TYPES),
                help="Type of the weights: f32 to q2_k in GGUF, 8bit to 3bit for MLX. Default: f16 for "
                "gguf, q8_0 for ollama and LM Studio's GGUF, floats for MLX, f32 for an adapter. What no "
                "adapter changed of a base in 2 to 4 bits stays exact in q4_1, of one in 5 bits in q5_1, "
                "and for MLX in as many bits or more.",
            ),
            option(
                "--imatrix",
                metavar="FILE",
                help="Importance matrix of llama-imatrix: what an error in each column of a weight costs.",
            ),
            option(
                "--calibrate",
                metavar="TEXT_FILE",
                help="Measure the importance matrix here, over this text.",
            ),
            option(
                "--dtype",
                type=click.Choice(["float32", "float16", "bfloat16"]),
                help="Type of the weights in mlx and hf folders. Default: as the base stores them.",
            ),
            option(
                "--name",
                help="Name of the model in Ollama, or NAME or PUBLISHER/NAME in LM Studio. Default: the "
                "run folder's name.",
            ),
            option(
                "--format",
                type=click.Choice(["mlx", "gguf"]),
                help="What LM Studio is given. Default: mlx on Apple silicon, gguf elsewhere.",
            ),
            option("--system", metavar="TEXT", help="System prompt of the model in Ollama."),
            option(
                "--push",
                metavar="USER/REPO",
                help="Upload the result (mlx, hf, gguf, peft) to the Hugging Face Hub, with its model "
                "card. A repository that is new is public.",
            ),
            base_option(),
        ],
        help="Merge the adapter into the model and write it for other programs.",
    )
