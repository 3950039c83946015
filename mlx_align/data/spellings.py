"""Other tools' spellings of a row, brought into the one that `data.records` reads.

    ShareGPT   {"conversations": [{"from": "human", "value": ...}, ...]}         -> messages
    Alpaca     {"instruction": ..., "input": ..., "output": ..., "history": ...} -> prompt, completion
    OpenAI     {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    LLaMA-Factory   ShareGPT and Alpaca rows with "chosen" and "rejected", or with "kto_tag"

Names that no tool agrees on are told with `--field`, see `rename`.
"""

from collections.abc import Mapping, Sequence

from mlx_align.errors import DataError, SettingsError

# Who speaks, in ShareGPT's files and their descendants.
ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
# The columns whose values are messages.
SPOKEN = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def canonical_row(row: dict, origin: str) -> dict:
    """The row with the names of `data.records`; a row that has them already comes back unchanged."""
    row = {key: _spoken(value) if key in SPOKEN else value for key, value in row.items()}
    if "preferred_output" in row and "non_preferred_output" in row:
        row = _openai(row)
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    if "kto_tag" in row and "label" not in row:
        row["label"] = row.pop("kto_tag")
    if "messages" in row and ("chosen" in row or "rejected" in row) and "prompt" not in row:
        row["prompt"] = row.pop("messages")
    if "instruction" in row and "prompt" not in row:
        row = _alpaca(row, origin)
    return row


def _spoken(value):
    """Messages with "from" and "value" as messages with "role" and "content"."""
    if isinstance(value, Mapping) and "from" in value and "value" in value:
        role = ROLES.get(str(value["from"]).lower(), str(value["from"]))
        return {"role": role, "content": value["value"]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_spoken(item) for item in value]
    return value


def _openai(row):
    given = row.get("input")
    if isinstance(given, Mapping):
        row = {**row, **{k: given[k] for k in ("tools",) if given.get(k)}}
        row["prompt"] = given.get("messages", ())
    return {
        **row,
        "chosen": _spoken(row["preferred_output"]),
        "rejected": _spoken(row["non_preferred_output"]),
    }


def _alpaca(row, origin):
    """Instruction and input make the prompt; earlier exchanges stand in "history" as pairs."""
    parts = [row["instruction"], row.get("input") or ""]
    prompt = "\n\n".join(str(part) for part in parts if str(part).strip())
    history = row.get("history") or ()
    if history:
        turns = []
        for exchange in history if isinstance(history, Sequence) else [history]:
            if (
                not isinstance(exchange, Sequence)
                or len(exchange) != 2
                or isinstance(exchange, str)
            ):
                raise DataError(f'{origin}: "history" must be a list of [question, answer]')
            question, answer = exchange
            turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        prompt = [*turns, {"role": "user", "content": prompt}]
    row = {**row, "prompt": prompt}
    if "output" in row and "completion" not in row:
        output = row["output"]
        # Preference files of this family list the better answer first.
        if isinstance(output, Sequence) and not isinstance(output, str) and len(output) == 2:
            row["chosen"], row["rejected"] = output
        else:
            row["completion"] = output
    return row


def parse_fields(fields: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """("label=rating", ...) as pairs of our name and the file's."""
    pairs = []
    for field in fields:
        name, equals, source = (part.strip() for part in field.partition("="))
        if not (name and equals and source):
            raise SettingsError(f"field: {field!r} is not NAME=COLUMN (like label=rating)")
        pairs.append((name, source))
    return tuple(pairs)


def rename(row, fields: Sequence[tuple[str, str]], origin: str):
    """The row with its columns under our names.

    A column is a key, a path through nested objects ("meta.rating"), or the difference of two
    columns ("score_chosen-score_rejected"). Raises `DataError` where a row lacks it.
    """
    if not fields or not isinstance(row, Mapping):
        return row
    values = {}
    for name, source in fields:
        found, value = _lookup(row, source)
        left, minus, right = source.partition("-")
        if not found and minus:
            (found, a), (also, b) = _lookup(row, left.strip()), _lookup(row, right.strip())
            found = found and also
            if found:
                try:
                    value = float(a) - float(b)
                except (TypeError, ValueError):
                    raise DataError(f"{origin}: {source}: {a!r} - {b!r} is no number") from None
        if not found:
            known = ", ".join(map(str, row)) or "none"
            raise DataError(
                f"{origin}: has no column {source!r} (--field {name}={source}); has {known}"
            )
        values[name] = value
    sources = {source for _, source in fields}
    return {**{k: v for k, v in row.items() if k not in sources}, **values}


def _lookup(row, path):
    if path in row:
        return True, row[path]
    for key in path.split("."):
        if not isinstance(row, Mapping) or key not in row:
            return False, None
        row = row[key]
    return True, row
