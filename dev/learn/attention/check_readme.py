#!/usr/bin/env python3
"""Whether README.md says where things are: every `name` [file:line](file#Lline) must be the line on which that
function's definition begins, and every linked file must be there. --fix puts the numbers right."""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
PLACE = re.compile(r"`(\w+)` \[([\w.]+):(\d+)\]\(\2#L(\d+)\)")


def line_of(name, file):
    """Where a function of this name is defined: a line that begins with its type, and is no declaration."""
    definition = re.compile(rf"(static |inline |void |bool |float |int |size_t |Score |Node\* )+{name}\(.*[^;]$")
    lines = (HERE / file).read_text().splitlines() if (HERE / file).exists() else []
    return next((number for number, line in enumerate(lines, 1) if definition.match(line)), None)


def main():
    readme = HERE / "README.md"
    text = readme.read_text()
    wrong = []

    def check(match):
        name, file, *numbers = match.groups()
        line = line_of(name, file)
        if line is None or numbers != [str(line)] * 2:
            actual = f"at line {line}" if line else "not there"
            wrong.append(f"{name} is said to be at {file}:{numbers[0]}, and is {actual}")
        return f"`{name}` [{file}:{line}]({file}#L{line})" if line else match.group()

    fixed = PLACE.sub(check, text)
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if ":" not in link}
    missing = sorted(link for link in links if not (HERE / link).exists())
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
