"""Turns the text of a Metal kernel into C++.

The text stays as it is except where C++ has no word for what Metal says: includes of Metal's own headers
go, `threadgroup` variables come from the runtime, function constants get their values, attributes go.
Address spaces are macros (include/metal_types.h). A parameter is bound by its attribute alone, so its type
need not be understood.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# The attributes of parameters that the runtime knows, by the type in the signatures MLX writes.
ATTRIBUTES = {
    "uint3": (
        "dispatch_threads_per_threadgroup",
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threadgroups_per_grid",
        "threads_per_grid",
        "threads_per_threadgroup",
    ),
    "uint": (
        "dispatch_simdgroups_per_threadgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "thread_index_in_simdgroup",
        "thread_index_in_threadgroup",
        "threads_per_simdgroup",
    ),
}

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r'\s*#\s*include\s+(?:"([^"]+)"|<[^>]+>)')
ATTRIBUTE = re.compile(r"\[\[(?:[^\[\]]|\[[^\[\]]*\])*?\]\]")
FUNCTION_CONSTANT = re.compile(
    r"constant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\d+\)\s*\]\]\s*;"
)
DECLARATOR = r"\w+\s*(?:\[[^;{}]*?\]\s*)*"
THREADGROUP_VARIABLES = re.compile(
    r"\bthreadgroup\s+((?:typename\s+|struct\s+)?[A-Za-z_][\w:]*(?:\s*<[^;{}()&*]*>)?(?:::\w+)?)\s+"
    rf"({DECLARATOR}(?:,\s*{DECLARATOR})*);"
)
KERNEL = r"(?:\[\[\s*kernel\b[^;{]*?\]\]|\bkernel)\s+void\s+"
# Left over, such a variable would silently be a thread's own.
NEITHER_POINTER_NOR_REFERENCE = re.compile(
    r"\bthreadgroup\b(?!(?:<[^;(){}]*>|[^;,(){}=<])*[*&])[^;]*;"
)


class SourceError(Exception):
    """Metal text that the emulator does not understand, or that misses something."""


def inline_includes(text: str, folders: Sequence[Path], name: str, seen: set[Path]) -> str:
    """The text without comments, with the files it includes by "..." in their places, each once."""
    text = COMMENT_OR_STRING.sub(
        lambda found: re.sub(r"[^\n]", " ", found[0]) if found[0][0] == "/" else found[0], text
    )
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = INCLUDE.match(line)
        if not include or not include[1]:
            lines.append("" if include else line)
            continue
        file = next((f / include[1] for f in folders if (f / include[1]).exists()), None)
        if file is None:
            raise SourceError(f"{name}:{number}: {include[1]} is in none of the folders")
        if file not in seen:
            seen.add(file)
            lines.append(inline_includes(file.read_text(), folders, include[1], seen))
        lines.append(f'#line {number + 1} "{name}"')
    return "\n".join(lines)


def translate(text: str, function: str, template: str, constants: Mapping) -> tuple[str, list[str]]:
    """C++ for a kernel function of a text from `inline_includes`, and the names of its buffers in order.

    `template` is the list of template arguments, "" for none; `constants` gives each function constant's
    value by name. The result needs metal_stdlib.h before it.
    """
    buffers, arguments = _bind(text, function)
    text = FUNCTION_CONSTANT.sub(lambda found: _constant(found, constants), text)
    inside = _kernel_bodies(text)
    for found in THREADGROUP_VARIABLES.finditer(text):
        if not any(start < found.start() < end for start, end in inside):
            raise SourceError(f"only kernels declare threadgroup variables: {found[0]}")
    text = ATTRIBUTE.sub("", THREADGROUP_VARIABLES.sub(_threadgroup_variables, text))
    if unknown := NEITHER_POINTER_NOR_REFERENCE.search(text):
        raise SourceError(f"this declaration is not understood: {unknown[0]}")
    call = f"{function}<{template}>" if template else function
    code = f"""{text}
extern "C" __attribute__((no_sanitize("thread")))
void emulator_kernel(void** buffers, const emulator::Thread& t) {{
  (void)t;
  {call}({", ".join(arguments)});
}}
"""
    return code, buffers


def _constant(found: re.Match, constants: Mapping) -> str:
    kind, name = found.groups()
    if name not in constants:
        raise SourceError(f"the function constant {name} has no value")
    return f"constexpr {kind} {name} = {str(constants[name]).lower()};"


def _threadgroup_variables(found: re.Match) -> str:
    kind, declarators = found.groups()
    parts = re.findall(r"(\w+)\s*((?:\[[^;{}]*?\]\s*)*)(?:,|$)", declarators)
    return " ".join(
        f"typedef {kind} {name}_type{size}; THREADGROUP_VARIABLE({name})" for name, size in parts
    )


def _kernel_bodies(text: str) -> list[tuple[int, int]]:
    """Where the bodies of all kernel functions start and end."""
    bodies = []
    for head in re.finditer(rf"{KERNEL}\w+\s*\(", text):
        depth, start = 0, text.find("{", head.end())
        for brace in re.finditer(r"[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                bodies.append((start, start + brace.end()))
                break
    return bodies


def _bind(text: str, function: str) -> tuple[list[str], list[str]]:
    """The names of the kernel function's buffers, and the C++ arguments of a call."""
    head = re.search(rf"{KERNEL}{function}\s*\(", text)
    if not head:
        raise SourceError(f"no kernel function {function}")
    buffers, arguments = [], []
    for parameter in _split(text[head.end() :]):
        attributes = set(re.findall(r"\w+", " ".join(ATTRIBUTE.findall(parameter))))
        parameter = ATTRIBUTE.sub("", parameter)
        values = [f"emulator::Position{{t.{a}}}" for a in ATTRIBUTES["uint3"] if a in attributes]
        values += [f"t.{a}" for a in ATTRIBUTES["uint"] if a in attributes]
        if "threadgroup" in attributes:
            raise SourceError(f"{function}: threadgroup memory as an argument is not supported")
        if not values:
            kind = "Reference" if "&" in parameter else "Pointer"
            values = [f"emulator::{kind}{{buffers[{len(buffers)}]}}"]
            buffers.append(re.search(r"(\w+)\s*(\[\w*\]\s*)?$", parameter)[1])
        arguments += values
    return buffers, arguments


def _split(text: str) -> list[str]:
    """The parameters up to the bracket that ends the list."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "([{<":
            depth += 1
        elif letter in ")]}>" and depth:
            depth -= 1
        elif letter in ",)" and not depth:
            parts.append(text[start:i])
            start = i + 1
            if letter == ")":
                break
    return [part for part in parts if part.strip()]
