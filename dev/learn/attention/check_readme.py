#!/usr/bin/env python3
"""Whether README.md's table says where things are: every `name` [file:line](file#Lline) must be the line on which the
function's definition begins, and every linked file must be there. --fix puts the numbers right."""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
PLACE = re.compile(r"`(\w+)` \[([\w.]+):(\d+)\]\(\2#L(\d+)\)")


def line_of(name, file):
    """Where a function of this name is defined: a line that begins with its type and ends neither in ; nor in ,"""
    for number, line in enumerate((HERE / file).read_text().splitlines(), 1):
        if re.match(rf"(static |inline |void |bool |float |int |size_t |Score |Node\* )+\*?{name}\(", line) and line[-1] != ";":
            return number
    return None


def main():
    readme = HERE / "README.md"
    text = readme.read_text()
    wrong = []

    def check(match):
        name, file, *numbers = match.groups()
        line = line_of(name, file)
        if line is None or numbers != [str(line)] * 2:
            wrong.append(f"{name} is said to be at {file}:{numbers[0]}, and is " + (f"at line {line}" if line else "not there"))
        return f"`{name}` [{file}:{line}]({file}#L{line})" if line else match.group()

    fixed = PLACE.sub(check, text)
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if ":" not in link and not (HERE / link).exists()]
    if "--fix" in sys.argv:
        readme.write_text(fixed)
        wrong = [w for w in wrong if w.endswith("not there")]
    for what in wrong + [f"{link} is not there" for link in missing]:
        print(f"  FAILED: README.md: {what}")
    count = len(PLACE.findall(text)) + 1
    failed = len(wrong) + len(missing)
    print(f"{max(count - failed, 0)} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
