#!/usr/bin/env python3
"""Writes the hashes of attention.html's style and script into its Content-Security-Policy, so that a browser runs them
and nothing else. To be run after every change of either; --check only says whether the page is sealed (exit status 1:
it is not)."""

import base64
import hashlib
import pathlib
import re
import sys

page = pathlib.Path(__file__).with_name("attention.html")
text = page.read_text(encoding="utf-8")


def seal(tag):
    inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S).group(1)
    return "'sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() + "'"


policy = f"default-src 'none'; style-src {seal('style')}; script-src {seal('script')}"
sealed = re.sub(r'(http-equiv="Content-Security-Policy" content=")[^"]*', lambda m: m.group(1) + policy, text)
if "--check" in sys.argv[1:]:
    sys.exit(0 if sealed == text else "attention.html: style or script has changed since dev/view/seal.py ran")
page.write_text(sealed, encoding="utf-8")
