"""The command line, as tests of what it builds use it."""

import time

import click.testing

from jax_nvfp4_moe.cli import main


def run(*arguments):
    """A command's exit code, stdout and stderr."""
    done = click.testing.CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return result
