"""C compilers as scripts in front of the one that is here."""

import subprocess

from mmcore.kernels import native


def wrapped(path, compiler=None, flags="", first=""):
    """`compiler` (or the one that is taken unasked) with these flags behind all others; `first` is run before it, in sh."""
    compiler = compiler or native.compiler()
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {compiler} --version\n{first}\nexec {compiler} "$@" {flags}\n')
    path.chmod(0o755)
    return path


def instructions(flags=(), compiler=None):
    """What the compiler may use with these flags, as its macros; None where it does not know one."""
    command = [compiler or native.compiler(), "-march=native", *flags, "-dM", "-E", "-x", "c", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode else result.stdout
