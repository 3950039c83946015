"""Records to ids: the boundary, the scored tokens, BOS and end tokens, truncation."""

import time

import numpy as np
import pytest
import tiny

from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    PairRecord,
    TextRecord,
    Unfit,
)
from mlx_align.data.template import ChatTemplate, Encoder, end_of_turn, find_template, text_prefix
from mlx_align.errors import DataError

THINKING = (
    # Like Qwen 3's: a thinking part goes before the last answer only.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (
    # Like DeepSeek R1's: the generation prompt opens a thought that a given answer does not have.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    made = {}

    def make(style="llama3", template="own"):
        if (style, template) not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            tiny.make_tokenizer(folder, style=style, template=template)
            made[style, template] = load_tokenizer(folder)
        return made[style, template]

    return make


def encoder_of(tokenizer, **options):
    options = {"max_length": 256, "template": find_template(tokenizer), **options}
    return Encoder(tokenizer, **options)


def turns(*contents):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))


def test_pair_ids_are_what_generation_sees(tokenizer_of):
    tokenizer = tokenizer_of()
    (example,) = encoder_of(tokenizer).examples(PairRecord("Hi there", "Yes!", "No way.", "f:1"))
    prompt = tokenizer.apply_chat_template(turns("Hi there"), add_generation_prompt=True)
    assert example.prompt.tolist() == list(prompt)
    for ids, text in zip(example.completions, ("Yes!", "No way."), strict=True):
        assert tokenizer.decode(ids.tolist()) == text + "<|eot_id|>"
    assert all(mask.all() for mask in example.scored)


def test_bos_stands_once_and_first(tokenizer_of):
    tokenizer = tokenizer_of()
    for record in (
        PairRecord("Hi", "Yes", "No", "f:1"),
        CompletionRecord(turns("Hi"), turns("", "Yes")[1:], "f:1"),
        TextRecord("some text", "f:1"),
    ):
        for prompt_format in ("auto", "text"):
            if prompt_format == "text" and not isinstance(getattr(record, "prompt", ""), str):
                continue
            (example,) = encoder_of(tokenizer, prompt_format=prompt_format).examples(record)
            ids = example.prompt.tolist() + example.completions[0].tolist()
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def test_plain_text_gets_one_end_token(tokenizer_of):
    tokenizer = tokenizer_of(template=None)
    encoder = encoder_of(tokenizer)
    (example,) = encoder.examples(PairRecord("Hi", " yes", " no<|eot_id|>", "f:1"))
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt.tolist()) == "<|begin_of_text|>Hi"
    for ids in example.completions:
        assert ids.tolist().count(eos) == 1 and ids[-1] == eos


def test_text_rows_score_every_token_but_bos(tokenizer_of):
    tokenizer = tokenizer_of()
    (example,) = encoder_of(tokenizer).examples(TextRecord("The quick brown fox", "f:1"))
    assert example.prompt.tolist() == [tokenizer.bos_token_id]
    assert tokenizer.decode(example.completions[0].tolist()) == "The quick brown fox<|eot_id|>"
    tokenizer = tokenizer_of("qwen2")
    (example,) = encoder_of(tokenizer).examples(TextRecord("The quick brown fox", "f:1"))
    assert (
        len(example.prompt) == 1
    )  # without a BOS the first token has nothing to be predicted from


def test_all_assistant_turns_are_scored_and_nothing_else(tokenizer_of):
    for style, end in (("llama3", "<|eot_id|>"), ("qwen2", "<|im_end|>")):
        tokenizer = tokenizer_of(style)
        record = ChatRecord(turns("Hi", "Yes", "Why?", "So it is.", "Really?", "No."), "f:1")
        (example,) = encoder_of(tokenizer).examples(record)
        ids, mask = example.completions[0], example.scored[0]
        spans, current = [], []
        for token, scored in zip(ids.tolist(), mask.tolist(), strict=True):
            if scored:
                current.append(token)
            elif current:
                spans.append(current)
                current = []
        spans.append(current)
        assert [tokenizer.decode(s) for s in spans] == ["Yes" + end, "So it is." + end, "No." + end]
        rendered = tokenizer.apply_chat_template(list(record.messages), tokenize=False).rstrip("\n")
        assert tokenizer.decode([*example.prompt.tolist(), *ids.tolist()]) == rendered


def test_text_behind_the_end_token_is_not_learnt(tokenizer_of):
    # ChatML puts a new line behind <|im_end|>; no generation ever reaches it.
    tokenizer = tokenizer_of("qwen2")
    (example,) = encoder_of(tokenizer).examples(PairRecord("Hi", "Yes", "No", "f:1"))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in example.completions)


def test_templates_that_rewrite_earlier_turns_are_split_by_turn(tokenizer_of):
    tokenizer = tokenizer_of("qwen2", THINKING)
    encoder = encoder_of(tokenizer)
    examples = encoder.examples(ChatRecord(turns("Hi", "Yes", "Why?", "So it is."), "f:1"))
    assert len(examples) == 2
    texts = [tokenizer.decode(e.completions[0].tolist()) for e in examples]
    assert texts == [f"<think>\n\n</think>\n\n{t}<|im_end|>" for t in ("Yes", "So it is.")]
    # The second prompt shows the first answer as generation would: without its thinking part.
    assert tokenizer.decode(examples[1].prompt.tolist()).count("<think>") == 0
    assert sum(encoder.counts.values()) == 1


def test_prompts_that_open_a_thought_are_cut_before_it(tokenizer_of):
    tokenizer = tokenizer_of("qwen2", REASONING)
    encoder = encoder_of(tokenizer)
    (example,) = encoder.examples(PairRecord("Hi", "Yes", "No", "f:1"))
    assert tokenizer.decode(example.prompt.tolist()).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(example.completions[0].tolist()) == "Yes<|im_end|>"
    assert encoder.counts["prompts cut where the template rewrites the opening of the answer"] == 1


def test_a_template_that_refuses_a_row_names_its_reason(tokenizer_of):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer = tokenizer_of("qwen2", refusing)
    messages = ({"role": "system", "content": "s"}, *turns("Hi", "Yes"))
    with pytest.raises(Unfit, match="the chat template refuses it: no system"):
        encoder_of(tokenizer).examples(ChatRecord(messages, "f:1"))


def test_messages_without_a_template_are_an_error(tokenizer_of):
    encoder = encoder_of(tokenizer_of(template=None))
    with pytest.raises(DataError, match="--chat-template"):
        encoder.examples(ChatRecord(turns("Hi", "Yes"), "f:1"))


def test_transcripts_are_chat_where_there_is_a_template_and_text_elsewhere(tokenizer_of):
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Why?\n\nAssistant:"
    record = PairRecord(prompt, " So.", " No.", "f:1")
    tokenizer = tokenizer_of()
    (example,) = encoder_of(tokenizer).examples(record)
    expected = tokenizer.apply_chat_template(turns("Hi", "Yes", "Why?"), add_generation_prompt=True)
    assert example.prompt.tolist() == list(expected)
    assert tokenizer.decode(example.completions[0].tolist()) == "So.<|eot_id|>"
    tokenizer = tokenizer_of(template=None)
    (example,) = encoder_of(tokenizer).examples(record)
    assert tokenizer.decode(example.prompt.tolist()) == "<|begin_of_text|>" + prompt
    assert tokenizer.decode(example.completions[0].tolist()) == " So.<|eot_id|>"


def test_rendered_prompts_are_not_rendered_again(tokenizer_of):
    tokenizer = tokenizer_of()
    text = tokenizer.apply_chat_template(turns("Hi"), add_generation_prompt=True, tokenize=False)
    (example,) = encoder_of(tokenizer).examples(
        PairRecord(text.removeprefix("<|begin_of_text|>"), "Yes", "No", "f:1")
    )
    assert tokenizer.decode(example.prompt.tolist()) == text


def test_an_open_assistant_turn_is_continued(tokenizer_of):
    tokenizer = tokenizer_of()
    record = PairRecord(turns("Hi", "Yes, "), "sure", "maybe", "f:1")
    (example,) = encoder_of(tokenizer).examples(record)
    assert tokenizer.decode(example.prompt.tolist()).endswith("\n\nYes,")
    full = tokenizer.decode([*example.prompt.tolist(), *example.completions[0].tolist()])
    assert full.endswith("Yes, sure<|eot_id|>")


def test_truncation_is_counted_and_long_prompts_dropped(tokenizer_of):
    tokenizer = tokenizer_of()
    encoder = encoder_of(tokenizer, max_length=40)
    (example,) = encoder.examples(PairRecord("Hi", "yes " * 50, "no", "f:1"))
    assert max(example.lengths) == 40
    assert example.completions[0][-1] != tokenizer.eos_token_id  # not taught as an end
    assert encoder.counts["completions truncated (their end is not learnt)"] == 1
    with pytest.raises(Unfit, match="prompt fills the length limit of 40 tokens"):
        encoder.examples(PairRecord("Hi " * 50, "yes", "no", "f:1"))
    with pytest.raises(Unfit, match="chosen equals rejected once tokenised and truncated"):
        encoder.examples(PairRecord("Hi", "a " * 50 + "b", "a " * 50 + "c", "f:1"))


def test_equal_content_has_equal_uid(tokenizer_of):
    encoder = encoder_of(tokenizer_of())
    a, b, c = (
        encoder.examples(PairRecord("Hi", "Yes", rejected, origin))[0]
        for rejected, origin in (("No", "f:1"), ("No", "g:7"), ("Never", "f:1"))
    )
    assert a.uid == b.uid != c.uid


def test_merging_at_the_boundary_is_counted_and_generation_wins(tokenizer_of):
    tokenizer = tokenizer_of(template=None)
    encoder = encoder_of(tokenizer)
    # "the" would be one token; generation from "t" cannot see that.
    (example,) = encoder.examples(PairRecord("over t", "he lazy", "xx", "f:1"))
    alone = tokenizer.encode("over t", add_special_tokens=False)
    assert example.prompt.tolist()[1:] == list(alone)
    assert encoder.counts["boundaries where a joint tokenisation would differ"] == 1
    assert tokenizer.decode(example.completions[0].tolist()) == "he lazy<|eot_id|>"


def test_sentencepiece_puts_no_space_in_front_of_a_completion(shared, tmp_path):
    from mlx_lm.utils import load_tokenizer

    folder = tmp_path / "spm"
    folder.mkdir()
    tiny.make_sentencepiece(folder, shared("vocab/llama2_tokenizer.model"), keep_model=False)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, max_length=100)
    (example,) = encoder.examples(PairRecord("Question: why?\nAnswer:", " because", "never", "f:1"))
    texts = [tokenizer.convert_ids_to_tokens(c.tolist()) for c in example.completions]
    assert texts[0][0] == "▁because"
    assert "".join(texts[1]) == "never</s>"  # and not "▁never": no space was asked for


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_reaches_the_template(tokenizer_of, thinking):
    source = tiny.CHATML + "{{ enable_thinking }}"
    encoder = encoder_of(tokenizer_of("qwen2", source), thinking=thinking)
    ids = encoder.prompt_ids("Hi")
    assert encoder.tokenizer.decode(ids).endswith(str(thinking))


def test_end_of_turn_is_found_by_rendering(tokenizer_of):
    tokenizer = tokenizer_of("qwen2")
    assert end_of_turn(tokenizer, find_template(tokenizer)) == (
        tokenizer.eos_token_id,
        "<|im_end|>",
    )
    plain = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\nEND {% endfor %}")
    assert end_of_turn(tokenizer, plain) == (None, "END")


def test_text_prefix(tokenizer_of):
    assert text_prefix(tokenizer_of("llama3")) == [tokenizer_of("llama3").bos_token_id]
    assert text_prefix(tokenizer_of("qwen2")) == []


def test_the_date_of_a_template_can_be_fixed():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, date="2025-03-01").render((), generation=False) == "01 Mar 2025"


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB-SmolLM3-3B", "LFM2.5-Instruct", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "google-gemma-2-2b-it",
        "Mistral-Small-3.2-24B-Instruct-2506",
    ],
)  # fmt: skip
def test_real_templates_render_as_transformers_renders_them(shared, name):
    import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    source = shared(f"templates/{name}.jinja").read_text(encoding="utf-8")
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(source, variables, datetime.date.today().isoformat())
    system = {"role": "system", "content": "Be brief."}
    for messages in (
        turns("Hi"),
        turns("Hi", "Yes"),
        turns("Hi", "Yes", "Why?"),
        (system, *turns("Hi")),
    ):
        for generation in (True, False):
            try:
                expected, _ = render_jinja_template(
                    [list(messages)],
                    chat_template=source,
                    add_generation_prompt=generation,
                    **variables,
                )
            except Exception:  # the template refuses it, and so must we
                with pytest.raises(Unfit):
                    template.render(messages, generation=generation)
                continue
            assert template.render(messages, generation=generation) == expected[0]


def test_masks_and_ids_fit(tokenizer_of):
    (example,) = encoder_of(tokenizer_of()).examples(ChatRecord(turns("a", "b", "c", "d"), "f:1"))
    assert example.prompt.dtype == np.int32 and example.scored[0].dtype == bool
    assert len(example.completions[0]) == len(example.scored[0])
    assert example.lengths == (example.packed_length,)


# Templates that would run for ever, take all memory, or cannot even be read.
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested letters": "{% set s = 'a' * 99999 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two calls each": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "power": "{{ 99999999 ** 99999999 }}",
    "product": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ (10 ** 10 * [0]) | length }}",
    "wide": "{{ 'a'.ljust(10 ** 10) }}",
    "wide filter": "{{ 'a' | center(10 ** 10) }}",
    "wide format": "{{ '%9999999999s' % 'a' }}",
    "wide fields": "{{ '{:>9999999999}'.format('a') }}",
    **{
        f"doubled by {how}": (
            "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
            + doubling
            + "{% endfor %}{{ n.s }}"
        )
        for how, doubling in {
            "joining": "{% set n.s = n.s ~ n.s %}",
            "adding": "{% set n.s = n.s + n.s %}",
            "a filter": "{% set n.s = n.s | replace('a', 'aaa') %}",
            "a block": "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}",
        }.items()
    },
    "much text": "{% set s = 'a' * 99999 %}{% for a in s %}{{ s }}{% endfor %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "many loops deep": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "long": "{% if a %}b{% endif %}" * 20_000,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end_are_errors(name):
    start = time.process_time()
    with pytest.raises(DataError, match="the chat template"):
        ChatTemplate(ENDLESS[name]).render(turns("Hi"), generation=True)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}",
        "{{ messages.pop() }}", "{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{{ strftime_now(3) }}",
        "{{ none() }}", "{{ messages[0].nothing.more }}", "{{ [1] | slice(0) | list }}",
        "{{ '\\ud800' }}",
    ],
)  # fmt: skip
def test_what_a_template_must_not_do_is_a_row_it_refuses(source):
    with pytest.raises(Unfit, match="refuses it"):
        ChatTemplate(source).render(turns("Hi"), generation=True)


def test_bounds_change_nothing_that_templates_do():
    source = (
        "{% for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last }} "
        "{% else %}none{% endfor %}{{ '%s-%05d' % ('a', 7) }} {{ '{:>4}'.format('b') }} {{ 2 ** 10 }} "
        "{{ ['x', 'y'] | join('+') | upper }} {{ 1700000000 * 1000 | int }} {{ {'k': 1} | tojson }} "
        "{% set a %}c{% endset %}{{ a ~ 'd' ~ 3 }}"
    )
    expected = '1/2 2/2. a-00007    b 1024 X+Y 1700000000000 {"k": 1} cd3'
    assert ChatTemplate(source).render(turns("Hi", "Yes"), generation=True) == expected
    with pytest.raises(DataError, match="is no text but list"):
        ChatTemplate(["a"])
