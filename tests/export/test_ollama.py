"""The Modelfile: a template that renders as the Jinja one does, stops, and the call of the program."""

import os
import shutil
import subprocess

import pytest
import tiny

from mlx_align import api
from mlx_align.data.template import ChatTemplate
from mlx_align.errors import ExportError
from mlx_align.export.ollama import GUARD, derive_go_template, export_ollama, write_modelfile
from mlx_align.model.load import load_model

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    + tiny.CHATML
)
TALKS = [
    [("user", "Hello there")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three")],
    [("system", "Be brief."), ("user", "Why {{ not }}?")],
    [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ],
]
GO = """package main
import ("encoding/json"; "fmt"; "os"; "text/template")
type message struct { Role, Content string }
func main() {
  source, _ := os.ReadFile(os.Args[1])
  t := template.Must(template.New("t").Parse(string(source)))
  var talks [][]message
  json.NewDecoder(os.Stdin).Decode(&talks)
  var out []string
  for _, talk := range talks {
    system := ""
    for _, m := range talk { if m.Role == "system" { system = m.Content } }
    f, _ := os.CreateTemp("", "out")
    t.Execute(f, map[string]any{"Messages": talk, "System": system})
    f.Close()
    text, _ := os.ReadFile(f.Name())
    out = append(out, string(text))
  }
  json.NewEncoder(os.Stdout).Encode(out)
  fmt.Print()
}
"""


def model_with(model_folder, template):
    family = "llama" if "bos_token" in template else "qwen2"
    return load_model(str(model_folder(family, template=template)))


def go_renders(source, talks, folder):
    """What Go's own text/template makes of it."""
    import json

    if shutil.which("go") is None:
        pytest.skip("Go templates are rendered by Go where it is installed")
    (folder / "main.go").write_text(GO)
    (folder / "template").write_text(source)
    rows = [[{"Role": role, "Content": content} for role, content in talk] for talk in talks]
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    done = subprocess.run(
        ["go", "run", "main.go", "template"], cwd=folder, input=json.dumps(rows), env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "template",
    [tiny.CHATML, tiny.LLAMA3, DEFAULT_SYSTEM, LLAMA2],
    ids=["chatml", "llama3", "default", "llama2"],
)
def test_derived_templates_render_what_jinja_renders(model_folder, tmp_path, template):
    loaded = model_with(model_folder, template)
    go = derive_go_template(loaded)
    assert go is not None
    talks = [t for t in TALKS if template != LLAMA2 or t[0][0] != "system"]
    expected = []
    for talk in talks:
        messages = [{"role": role, "content": content} for role, content in talk]
        text = loaded.template.render(messages, generation=True)
        expected.append(text.removeprefix(loaded.tokenizer.bos_token or ""))
    assert go_renders(go, talks, tmp_path) == expected


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct",
        "google-gemma-2-2b-it",
        "Qwen-Qwen3-0.6B",
        "HuggingFaceTB-SmolLM3-3B",
    ],
)
def test_real_templates(shared, model_folder, tmp_path, name):
    loaded = load_model(str(model_folder("qwen2")))
    source = shared(f"templates/{name}.jinja").read_text(encoding="utf-8")
    loaded.template = ChatTemplate(source, {"bos_token": ""})
    go = derive_go_template(loaded)
    if name != "google-gemma-2-2b-it":
        # These put thinking, tools or dates where a plain template cannot.
        talks = TALKS if go else []
    else:
        assert go is not None
        talks = [t for t in TALKS if t[0][0] != "system"]
    expected = [
        loaded.template.render([{"role": r, "content": c} for r, c in talk], generation=True)
        for talk in talks
    ]
    if talks:
        assert go_renders(go, talks, tmp_path) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
        "{{ messages | length }}" + tiny.CHATML,
    ],
)
def test_templates_that_cannot_be_written_in_go_are_left_to_the_file(
    model_folder, tmp_path, template, caplog
):
    loaded = model_with(model_folder, template)
    assert derive_go_template(loaded) is None
    assert "TEMPLATE" not in write_modelfile(loaded, None)
    import gguf

    out = export_ollama(loaded, tmp_path / "out", quantise="f16", name="x")
    keys = gguf.GGUFReader(out / "model.gguf").fields
    inside = keys["tokenizer.chat_template"].contents()
    assert inside == template + GUARD and len(GUARD) > 100
    guarded = ChatTemplate(inside).render([{"role": "user", "content": "Hi"}], generation=True)
    assert guarded == ChatTemplate(template).render(
        [{"role": "user", "content": "Hi"}], generation=True
    )


def test_the_modelfile(model_folder):
    loaded = load_model(str(model_folder("llama")))
    text = write_modelfile(loaded, derive_go_template(loaded))
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|eot_id|>"\n' in text
    assert "<|begin_of_text|>" not in text  # Ollama adds it, as the file says
    assert "PARAMETER num_ctx 512\n" in text
    with pytest.raises(ExportError, match='contains """'):
        write_modelfile(loaded, 'a """ b')


def fake_ollama(folder, status=0):
    folder.mkdir()
    script = folder / "ollama"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/called\necho "no server here" >&2\nexit {status}\n'
    )
    script.chmod(0o755)
    return folder


def test_ollama_is_called_where_it_is_installed(model_folder, tmp_path, monkeypatch, caplog):
    tools = fake_ollama(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with caplog.at_level("INFO", logger="mlx_align"):
        out = api.export_model(
            str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama"
        )
    assert (tools / "called").read_text().split() == [
        "create",
        "my-llama",
        "-f",
        f"{out}/Modelfile",
    ]
    assert "ollama run my-llama" in caplog.text


def test_a_failing_ollama_loses_nothing(model_folder, tmp_path, monkeypatch, caplog):
    tools = fake_ollama(tmp_path / "bin", status=1)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    out = api.export_model(str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama")
    assert (out / "model.gguf").exists() and (out / "Modelfile").exists()
    assert (
        "no server here" in caplog.text
        and f"ollama create my-llama -f {out}/Modelfile" in caplog.text
    )


def test_without_ollama_the_command_is_shown(model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO", logger="mlx_align"):
        api.export_model(str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama")
    assert "ollama create my-llama -f" in caplog.text
