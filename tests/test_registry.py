"""Registries: found by name, by the file that is called like it, refused with the nearest name, no two of one name."""

from __future__ import annotations

import sys

import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package of two things, one file each, and one more in a file of another name."""
    package = tmp_path / "made_things"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from rnn_longctx.registry import Registry\nTHINGS = Registry('thing', __name__)\n"
    )
    one = "from made_things import THINGS\n@THINGS.register\nclass {0}:\n    name = '{1}'\n"
    (package / "first_thing.py").write_text(one.format("First", "first-thing"))
    (package / "others.py").write_text(one.format("Second", "second") + one.format("Third", "third"))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("made_things").THINGS
    for name in [name for name in sys.modules if name.startswith("made_things")]:
        del sys.modules[name]


def test_one_name_costs_one_file(folder):
    assert folder["first-thing"].__name__ == "First" and "made_things.others" not in sys.modules
    assert folder["third"].__name__ == "Third"  # of a file that is not called so: all are read
    assert list(folder) == ["first-thing", "second", "third"] and len(folder) == 3
    assert "fourth" not in folder and None not in folder


def test_unknown_names_are_refused_with_the_nearest(folder):
    with pytest.raises(InputError, match=r"unknown thing 'frist-thing'; did you mean \"first-thing\"\?"):
        folder["frist-thing"]
    with pytest.raises(InputError, match="choices: first-thing, second, third"):
        folder["os"]


def test_two_of_one_name_are_refused(folder):
    class Second:
        name = "second"

    with pytest.raises(InputError, match=r"two things are called 'second': made_things\.others\.Second and"):
        list(folder) and folder.register(Second)
    assert folder["second"].__module__ == "made_things.others"
    with pytest.raises(InputError, match="has none"):
        folder.register(object)


def test_a_file_that_cannot_be_imported_says_why(folder, tmp_path):
    (tmp_path / "made_things" / "broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        folder["broken"]


def test_a_registry_of_no_folder():
    things: Registry = Registry("thing")

    @things.register
    class One:
        name = "one"

    assert things.register(One) is One and dict(things) == {"one": One}
