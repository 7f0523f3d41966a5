"""--config: the flags of an earlier run, replayed, with those given beside it in their place."""

import json
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from experiment.checks import complete_flags, refuse_to_run_code, without_effect
from experiment.flags import flag, load_layer_sparsity, parse, resolve
from utils.errors import UsageError

ARGS = "args.json"
# What a run was is replayed; where it ran, what it was called, and what a command did with it are not.
NOT_REPLAYED = {"config", "output_dir", "remark", "resume", "evaluate", "device", "no_cuda", "workers"}
# Flags that mean something only beside another one: where that one is given, these begin at their defaults.
BELONG_TO = {"dataset": ("data_dir", "image_size", "stem"), "arch": ("depth", "stem")}


def parse_and_replay(
    argv: list[str] | None = None, without: Collection[str] = frozenset()
) -> tuple[Namespace, set[str]]:
    """Return the flags, those of --config included, and the names of those that were given or are replayed.

    A flag of the file that has its default is left to its default, which may depend on flags given beside it. A flag of
    the file that these leave without effect is left out, and so is one that is named by `without`.

    Raises:
        UsageError: a flag that does not exist or a value that it cannot have, here or in the file; or the file of
            --sparsity-config has changed since.
    """
    args, given = parse(argv)
    off = {name for name in given if getattr(args, name) is False}
    if args.config is None:
        for name in sorted(off):
            raise UsageError(f"{flag(f'no_{name}')} turns off what --config turns on: give --config, or leave it out")
        return args, given
    if args.evaluate:
        raise UsageError("--config is for a training and has no effect with --evaluate: leave it out")
    told = read_recipe(args.config)
    refuse_to_run_code(given, told)
    changed = {name for name in given if getattr(args, name) != told[name]}
    belonging = {other for name in changed for other in BELONG_TO.get(name, ())}
    recipe = {name: told[name] for name in _not_default(told).difference(given, belonging, without)}
    while True:
        replayed = Namespace(**vars(args) | recipe)
        useless = recipe.keys() & without_effect(replayed).keys()
        if not useless:
            if "sparsity_config" in recipe:
                refuse_other_sparsities(args.config, recipe["sparsity_config"])
            return replayed, (given - off) | recipe.keys()
        recipe = {name: value for name, value in recipe.items() if name not in useless}


def read_recipe(path: Path) -> dict:
    """Return the flags of a run by name, as its args.json has them, and the defaults of those that are not replayed.

    Args:
        path: of the file, or of the run's directory.

    Raises:
        UsageError: it cannot be read, or has flags or values that this version does not have.
    """
    path = path / ARGS if path.is_dir() else path
    try:
        saved = dict(json.loads(path.read_text())["args"])
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror}): --config takes the {ARGS} of a run") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not the {ARGS} of a run: it has no flags under \"args\"") from error
    known = vars(parse([])[0]).keys()
    unknown = [
        f"{flag(name)} {value}"
        for name, value in saved.items()
        if name not in known and value not in (None, False, [], "")
    ]
    if unknown:
        raise UsageError(
            f"'{path}' has flags that this version of the program does not: {', '.join(unknown)}; take the version that wrote "
            "it, whose git revision is in it, or delete them from a copy"
        )
    replayed = {name: value for name, value in complete_flags(saved).items() if name in known - NOT_REPLAYED}
    try:
        return vars(parse(as_argv(replayed))[0])
    except UsageError as error:
        raise UsageError(f"'{path}': {error}") from error


def refuse_other_sparsities(path: Path, file: Path) -> None:
    """Raise UsageError where the file of --sparsity-config has other sparsities than when the run of `path` began."""
    path = path / ARGS if path.is_dir() else path
    told = json.loads(path.read_text()).get("layer_sparsity")
    beside = path.with_name(ARGS)  # of result.json, which has the flags alone
    if told is None and beside.exists():
        with suppress(ValueError, AttributeError):  # a torn file tells nothing
            told = json.loads(beside.read_text()).get("layer_sparsity")
    if told is not None and told != load_layer_sparsity(file):
        raise UsageError(
            f"'{file}' has other sparsities than when the run of '{path}' began: restore them, or give --sparsity-config "
            "beside --config to take the new ones"
        )


def _not_default(told: Mapping) -> set[str]:
    """Return the names of flags that have another value than they would have had if they had not been given."""
    default = vars(parse([])[0])
    names = {name for name, value in told.items() if default[name] is not None and value != default[name]}
    while True:  # a default may depend on a flag that was given
        again = vars(resolve(Namespace(**default | {name: told[name] for name in names})))
        missing = {name for name, value in told.items() if value not in (None, again[name])} - names
        if not missing:
            return names
        names |= missing


def as_argv(flags: Mapping[str, object] | Iterable[str]) -> list[str]:
    """Return flags as words of a command line.

    Args:
        flags: these words, or values by name: True for a switch, a list where a flag takes several, and None for what is
            not given. False is not given either, and beside `config` turns off a switch of that.
    """
    if isinstance(flags, str):
        raise UsageError("flags are values by name or a list of words, not one text: split it")
    if isinstance(flags, Mapping):
        words = [word for name, value in flags.items() for word in _words(name, value, "config" in flags)]
    else:
        words = [str(word) for word in flags]
    if {"-h", "--help"}.intersection(words):
        raise UsageError("--help is for the command line: leave it out")
    return words


def _words(name: str, value: object, beside_config: bool) -> list[str]:
    if value in (None, [], ()):
        return []
    if isinstance(value, list | tuple):
        return [flag(name), *map(str, value)]
    if value is False:
        return [flag(f"no_{name}")] if beside_config and name != "no_cuda" else []
    return [flag(name) if value is True else f"{flag(name)}={value}"]
