"""The Modelfile: a template that renders as the Jinja one does, stops, and how the model is made."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import gguf
import pytest
import tiny
from llama_cpp import Server
from ollama_api import FakeOllama, read_modelfile

from mlx_align import api
from mlx_align.data.records import Unfit
from mlx_align.data.template import ChatTemplate
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.go_template import derive_go_template
from mlx_align.export.ollama import (
    CHECKS,
    GUARD,
    Modelfile,
    create_in_ollama,
    export_ollama,
    make_modelfile,
)
from mlx_align.export.ollama_server import OllamaServer
from mlx_align.model.load import load_model

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {kind}.<|im_end|>\n{% endif %}"
    + tiny.CHATML
)
# As in Phi-3.5: an empty system prompt is none.
NOT_EMPTY = (
    "{% for m in messages %}{% if m.role != 'system' or m.content %}<|{{ m.role }}|>\n{{ m.content }}"
    "<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As in Phi-3 and OLMo 2: what is not to be answered ends otherwise.
OTHER_END = (
    NOT_EMPTY.replace(" or m.content", "").replace("if m.role != 'system'", "if true")
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
# As in Llama 3.1: the first system prompt stands in a text that is always there.
PREAMBLE = (
    "{{ bos_token }}{% set first = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n{{ first }}<|eot_id|>"
    "{% set messages = messages[1:] if messages[0].role == 'system' else messages %}"
) + tiny.LLAMA3.removeprefix("{{ bos_token }}")
# As in Vicuna: one system prompt or none, and a text in its place.
ONE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}A chat.{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %} USER: {{ m.content }}"
    "{% elif m.role == 'assistant' %} ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
# As in Gemma 3: the system prompt is part of the first question.
WITHIN_USER = (
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set messages = messages[1:] if first else messages %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {
    "chatml": tiny.CHATML,
    "llama3": tiny.LLAMA3,
    "default": DEFAULT_SYSTEM,
    "llama2": LLAMA2,
    "not empty": NOT_EMPTY,
    "other end": OTHER_END,
    "preamble": PREAMBLE,
    "one system prompt": ONE_SYSTEM,
    "within the user's turn": WITHIN_USER,
    "unprintable": tiny.CHATML.replace("\n{{", "\t\xa0{{").replace("{% endfor", "\u200b{% endfor"),
    "braces": "{{ '{' }}"
    + tiny.CHATML.replace("{{ m['content'] }}", "{{ '{{' + m.content + '}}' }}"),
}
# Where Go cannot follow: numbers, functions, and what changes from day to day or from turn to turn.
BEYOND_GO = {
    "numbers": "{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}",
    "functions": "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
    "turns": "{{ messages | length }}" + tiny.CHATML,
    "date": "{{ strftime_now('%d %b %Y') }}" + tiny.CHATML,
    "thoughts": tiny.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "left trim": tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'].lstrip() }}"),
    "last system": "{% for m in messages if m.role == 'system' %}{{ m.content if loop.last }}{% endfor %}"
    + tiny.CHATML.replace("in messages", "in messages if m.role != 'system'"),
}
# What derives a template has not seen these.
TALKS = [
    [("user", "Hello there")],
    [("user", "One\n\nmore"), ("assistant", "Two"), ("user", "Three")],
    [("system", "Be brief."), ("user", "Why {{ not }} {%- or -%} {?")],
    [("system", ""), ("user", "An empty system prompt")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("system", "T"), ("user", "c")],
    [("user", "a"), ("assistant", "b"), ("system", "late"), ("user", "c")],
    [("user", '"quotes" \'\' """ \\n \\" `'), ("assistant", "$x | <|im_end|>"), ("user", "{{ end }}")],
    [("system", "日本語 🦙"), ("user", "ñandú\u200d"), ("assistant", "Привет"), ("user", "\u00e9e\u0301")],
    [("system", "\t S \n"), ("user", "\n\n padded "), ("assistant", " \n"), ("user", " \r\n x\x0b")],
    [("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "S"), ("assistant", "a"), ("user", "b")],
    [("user", "a"), ("system", "S"), ("user", "b")],
    [("user", "\u3000\xa0 \u2003 a\u2028"), ("assistant", "\x85é\u3000\x1f"), ("user", "\ufeff \u200b")],
    [("user", "\u3000"), ("assistant", "\u3000\xa0\x85\t\u2009"), ("user", "a\u3000b" + " " * 999)],
]  # fmt: skip
GO = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type message struct { Role, Content string }
func main() {
  source, _ := os.ReadFile(os.Args[1])
  t := template.Must(template.New("").Option("missingkey=zero").Parse(string(source)))
  var talks [][]message
  json.NewDecoder(os.Stdin).Decode(&talks)
  var out []string
  for _, talk := range talks {
    var system []string
    for _, m := range talk { if m.Role == "system" { system = append(system, m.Content) } }
    var text strings.Builder
    err := t.Execute(&text, map[string]any{"Messages": talk, "System": strings.Join(system, "\\n\\n")})
    if err != nil { panic(err) }
    out = append(out, text.String())
  }
  json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.fixture(scope="session")
def go_renders(tmp_path_factory):
    """render(source, talks): what Go's own text/template makes of conversations."""
    if shutil.which("go") is None:
        pytest.skip("Go templates are rendered by Go where it is installed")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    build = ["go", "build", "-o", "render", "main.go"]
    subprocess.run(build, cwd=folder, env=environment, check=True)

    def render(source, talks):
        (folder / "template").write_text(source, newline="")
        rows = [[{"Role": role, "Content": content} for role, content in talk] for talk in talks]
        command = [folder / "render", folder / "template"]
        done = subprocess.run(
            command, input=json.dumps(rows), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    return render


def model_with(model_folder, template):
    family = "llama" if "bos_token" in template else "qwen2"
    return load_model(str(model_folder(family, template=template)))


def jinja_renders(loaded, talk):
    """What Ollama hands over of it: the text without the BOS; None where the template refuses."""
    messages = [{"role": role, "content": content} for role, content in talk]
    try:
        text = loaded.template.render(messages, generation=True)
    except Unfit:
        return None
    return text.removeprefix(loaded.tokenizer.bos_token or "")


def assert_same(loaded, go, go_renders):
    expected = [(talk, jinja_renders(loaded, talk)) for talk in TALKS]
    taken = [(talk, text) for talk, text in expected if text is not None]
    assert len(taken) > 2
    assert go_renders(go, [talk for talk, _ in taken]) == [text for _, text in taken]


@pytest.mark.parametrize("name", TEMPLATES)
def test_derived_templates_render_what_jinja_renders(model_folder, go_renders, name):
    loaded = model_with(model_folder, TEMPLATES[name])
    go = derive_go_template(loaded)
    assert go is not None
    assert_same(loaded, go, go_renders)
    assert read_modelfile(make_modelfile(loaded).text())[1] == ("TEMPLATE", go)


# Which of the published templates Go can follow. The others print the date, cut thoughts out of
# earlier turns, or want tools.
PUBLISHED = {
    "Qwen-Qwen2.5-7B-Instruct": True,
    "google-gemma-2-2b-it": True,
    "Qwen-Qwen3-0.6B": False,
    "HuggingFaceTB-SmolLM3-3B": False,
    "LFM2.5-Instruct": False,
    "Mistral-Small-3.2-24B-Instruct-2506": False,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": False,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": False,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(shared, model_folder, go_renders, name):
    loaded = load_model(str(model_folder("qwen2")))
    source = shared(f"templates/{name}.jinja").read_text(encoding="utf-8")
    loaded.template = ChatTemplate(source, {"bos_token": "", "eos_token": "</s>"})
    go = derive_go_template(loaded)
    assert (go is not None) == PUBLISHED[name]
    if go is not None:
        assert_same(loaded, go, go_renders)


def test_a_bos_that_the_tokenizer_does_not_add_stays_in_the_template(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    assert "<|begin_of_text|>" not in derive_go_template(load_model(str(folder)))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    assert "<|begin_of_text|>" in derive_go_template(load_model(str(folder)))


@pytest.mark.parametrize("name", BEYOND_GO)
@pytest.mark.parametrize("end", ["", "\n"])
def test_templates_beyond_go_are_left_to_the_file(model_folder, tmp_path, name, end, caplog):
    template = BEYOND_GO[name] + end
    loaded = model_with(model_folder, template)
    modelfile = make_modelfile(loaded)
    assert modelfile.template is None and "TEMPLATE" not in modelfile.text()
    assert "uses the one inside the GGUF" in caplog.text
    out = export_ollama(loaded, tmp_path / "out", modelfile, quantise="f16")
    keys = gguf.GGUFReader(out / "model.gguf").fields
    inside = keys["tokenizer.chat_template"].contents()
    assert inside.endswith(GUARD)
    for talk in TALKS:
        guarded = replace(loaded, template=ChatTemplate(inside, loaded.template.variables))
        assert jinja_renders(guarded, talk) == jinja_renders(loaded, talk)


@pytest.mark.parametrize("name", ["numbers", "turns"])
def test_llama_cpp_renders_guarded_templates_the_same(model_folder, tmp_path, name):
    loaded = model_with(model_folder, BEYOND_GO[name] + "\n")
    out = export_ollama(loaded, tmp_path / "out", make_modelfile(loaded), quantise="f32")
    server = Server(out / "model.gguf")
    for talk in TALKS[:3]:
        messages = [{"role": role, "content": content} for role, content in talk]
        assert server.chat_prompt(messages) == jinja_renders(loaded, talk)


def test_no_known_template_is_near_a_guarded_one(shared):
    # An edit brings in one letter at most, and no template has the guard's.
    assert GUARD.count("^") > 100
    for name in PUBLISHED:
        assert "^" not in shared(f"templates/{name}.jinja").read_text(encoding="utf-8")


def test_the_modelfile(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "License.txt").write_text('\ufeffDo what "you" want.\n\n\x0cNo warranty.\n')
    (folder / "NOTICE").write_text("By us.")
    loaded = load_model(str(folder))
    modelfile = make_modelfile(loaded, system='Be "brief".\nAlways.')
    assert read_modelfile(modelfile.text()) == [
        ("FROM", "./model.gguf"),
        ("TEMPLATE", derive_go_template(loaded)),
        ("PARAMETER stop", "<|eot_id|>"),
        ("PARAMETER num_ctx", "512"),
        ("SYSTEM", 'Be "brief".\nAlways.'),
        ("LICENSE", 'Do what "you" want.\n\nNo warranty.'),
    ]
    assert "<|begin_of_text|>" not in modelfile.text()  # Ollama adds it, as the file says


@pytest.mark.parametrize(
    "text",
    ["plain", ' "quoted" ', "\\ \\n", "two\nlines\r\n", '"', '""\n""', "#", "", "日本 {{ }}"],
)
def test_quoted_values_are_read_back(text):
    modelfile = Modelfile(text, (text,) if text else (), None, text)
    expected = [("TEMPLATE", text)] + [("PARAMETER stop", text), ("SYSTEM", text)] * bool(text)
    assert read_modelfile(modelfile.text())[1:] == expected


def test_what_cannot_be_said_is_refused(model_folder):
    with pytest.raises(ExportError, match='cannot hold """'):
        Modelfile('a """ b', (), None).text()
    with pytest.raises(ExportError, match=r"cannot hold U\+00A0, U\+200D, which Ollama leaves out"):
        Modelfile(None, (), None, system="Non\xa0! \N{WOMAN}\u200d\N{ROCKET}").text()
    with pytest.raises(SettingsError, match="no chat template that takes a system prompt"):
        make_modelfile(model_with(model_folder, LLAMA2), system="Be brief.")
    with pytest.raises(SettingsError, match="only a model in Ollama brings"):
        api.export_model("demo", "hf", system="Be brief.")
    with pytest.raises(SettingsError, match="'-f x' is no name of a model in Ollama"):
        api.export_model("demo", "ollama", name="-f x")


# -- making the model --------------------------------------------------------------------------------


@pytest.fixture
def exported(model_folder, tmp_path):
    """An exported folder and its Modelfile."""
    loaded = load_model(str(model_folder()))
    modelfile = make_modelfile(loaded, system="Be brief.")
    return export_ollama(loaded, tmp_path / "out", modelfile, quantise="f16"), modelfile


@pytest.fixture
def ollama(monkeypatch):
    """start(**fail) -> a server that OLLAMA_HOST names."""
    servers = []

    def start(**fail):
        servers.append(FakeOllama(**fail))
        monkeypatch.setenv("OLLAMA_HOST", servers[-1].address)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(params=["contract", "real"])
def address(request, ollama):
    """Of a server with the API's contract, and of an Ollama where there is one for tests."""
    if request.param == "contract":
        return ollama().address
    if "MLX_ALIGN_TEST_OLLAMA" not in os.environ:
        pytest.skip("needs an Ollama to make models in: MLX_ALIGN_TEST_OLLAMA=HOST:PORT")
    return os.environ["MLX_ALIGN_TEST_OLLAMA"]


def test_the_api(exported, address):
    folder, modelfile = exported
    server = OllamaServer(address)
    assert server.runs()
    with pytest.raises(ExportError, match="refused with status 4"):
        server.create(modelfile.request("mlx-align-test", "sha256:" + "0" * 64))
    digest = server.upload(folder / modelfile.file)
    assert server.upload(folder / modelfile.file) == digest
    server.create(modelfile.request("mlx-align-test", digest))
    _, reason = server.chat("mlx-align-test", "Hello!", 8)
    assert reason in ("stop", "length")
    with pytest.raises(ExportError, match="not found"):
        server.chat("mlx-align-test-that-is-not-there", "Hello!", 8)


def test_a_running_server_makes_the_model(model_folder, tmp_path, ollama, caplog):
    server = ollama()
    base = model_folder()
    with caplog.at_level("INFO", logger="mlx_align"):
        out = api.export_model(
            base, "ollama", output=tmp_path / "out", name="my-llama", system="Be brief."
        )
    request = server.models["my-llama"]
    assert server.blobs[request["files"]["model.gguf"]] == (out / "model.gguf").read_bytes()
    assert request["template"] == derive_go_template(load_model(str(base)))
    assert request["system"] == "Be brief."
    assert request["parameters"] == {"stop": ["<|eot_id|>"], "num_ctx": 512}
    assert "ollama run my-llama" in caplog.text and "did not end" not in caplog.text
    # What is there is not sent again.
    create_in_ollama(out, make_modelfile(load_model(str(base))), "again")
    assert server.uploads == 1 and "again" in server.models


def test_an_adapter_on_a_model_of_the_server(model_folder, tmp_path, ollama):
    server = ollama()
    adapter = tiny.make_adapter(tmp_path / "run", model_folder())
    out = api.export_model(adapter, "ollama", adapter_only=True, base_name="llama3.2:1b")
    request = server.models["run"]
    assert request["from"] == "llama3.2:1b" and "files" not in request
    assert server.blobs[request["adapters"]["adapter.gguf"]] == (out / "adapter.gguf").read_bytes()


def test_answers_that_do_not_end_are_shown(exported, ollama, caplog):
    server = ollama()
    server.said = "length"
    create_in_ollama(*exported, "m")
    assert caplog.text.count("did not end its answer") == len(CHECKS)
    assert "'Hm.'" in caplog.text and "PARAMETER stop is missing" in caplog.text


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ({"create": "error"}, "no space left"),
        ({"create": "end"}, "broke off while it made the model, after: writing manifest"),
        ({"create": "die"}, "broke off"),
        ({"create": 500}, "refused with status 500: out of luck"),
        ({"create": "sleep"}, "said nothing for 1 seconds"),
        ({"blobs": 507}, "refused with status 507"),
        ({"blobs": "die"}, "broke off"),
        ({"chat": "end"}, "broke off while m answered"),
        ({"chat": 500}, "out of luck"),
        ({"chat": "sleep"}, "said nothing for 1 seconds"),
        ({"create": b"[1]\n"}, "does not answer as ollama: b'[1]"),
        ({"create": b'{"status": "x"'}, "in the middle of a line"),
        ({"create": "cut"}, "refused with status 500: Internal Server Error"),
        ({"chat": b'{"done": true}\n'}, "broke off while m answered"),
    ],
)
def test_a_server_that_fails_loses_nothing(exported, ollama, monkeypatch, fail, words):
    ollama(**fail)
    monkeypatch.setattr("mlx_align.export.ollama.OllamaServer", lambda: OllamaServer(patience=1))
    folder, modelfile = exported
    with pytest.raises(ExportError) as caught:
        create_in_ollama(folder, modelfile, "m")
    assert words in str(caught.value)
    assert f"{folder} is kept; when that is mended, run: ollama create m -f" in str(caught.value)
    assert {p.name for p in folder.iterdir()} == {"model.gguf", "Modelfile"}


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("box:5000", "http://box:5000"),
        ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("::1", "http://[::1]:11434"),
        ("::", "http://[::1]:11434"),
        ('"box"', "http://box:11434"),
        ("box:", "http://box:11434"),
        ("https://box/ollama/", "https://box:443/ollama"),
    ],
)
def test_addresses(address, url):
    assert OllamaServer(address).url == url


@pytest.mark.parametrize("address", ["ftp://box", "box:port", "box:65536", "a box"])
def test_what_is_no_address(address):
    with pytest.raises(ExportError, match="no address of a server"):
        OllamaServer(address)


def test_a_wrong_address_loses_nothing(exported, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "ftp://box")
    with pytest.raises(ExportError, match=r"no address of a server.*is kept; when that is mended"):
        create_in_ollama(*exported, "m")


@pytest.mark.parametrize("answer", [b"5", b'["version"]', b"null", b"<html>", b""])
def test_another_server_is_no_ollama(ollama, answer):
    assert not OllamaServer(ollama(version=answer).address).runs()


def fake_program(folder, status=0):
    folder.mkdir()
    script = folder / "ollama"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/called\necho "no server here" >&2\nexit {status}\n'
    )
    script.chmod(0o755)
    return folder


def test_without_a_server_the_program_is_called(model_folder, tmp_path, monkeypatch, caplog):
    tools = fake_program(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with caplog.at_level("INFO", logger="mlx_align"):
        out = api.export_model(
            str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama"
        )
    called = (tools / "called").read_text().split()
    assert called == ["create", "my-llama", "-f", f"{out}/Modelfile"]
    assert "ollama run my-llama" in caplog.text


def test_a_failing_program_loses_nothing(model_folder, tmp_path, monkeypatch, caplog):
    tools = fake_program(tmp_path / "bin", status=1)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    out = api.export_model(str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama")
    assert (out / "model.gguf").exists() and (out / "Modelfile").exists()
    assert "no server here" in caplog.text
    assert f"ollama create my-llama -f {out}/Modelfile" in caplog.text


def test_without_ollama_the_command_is_shown(model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO", logger="mlx_align"):
        api.export_model(str(model_folder()), "ollama", output=tmp_path / "out", name="my-llama")
    assert "ollama create my-llama -f" in caplog.text
