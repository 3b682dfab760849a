"""Writes docs/flags.md from the flag table: python docs/make_flags.py."""

from pathlib import Path

from xattn import flag_table

HEAD = """# Flags

Every flag of a model, read off the code. The same names serve `Decoder(...)`, `xattn.build(...)`, YAML (`model.NAME=...`) and
checkpoints. *needs*: the flag without which this one is an error. *list*: a list gives one value a layer. *later*: meant to be
switched on for trained weights, so no warning on loading.

| flag | type | default | needs | list | later | what it does | also spelled |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def render() -> str:
    """The page."""
    rows = []
    for flag in flag_table().values():
        cells = (
            f"`{flag.name}`", flag.type.__name__, "" if flag.default is None else f"`{flag.default}`",
            f"`{flag.gate}`" if flag.gate else "", "yes" if flag.per_layer else "", "yes" if flag.inference else "",
            flag.help, ", ".join(f"`{alias}`" for alias in flag.aliases),
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "flags.md").write_text(render(), encoding="utf-8")
