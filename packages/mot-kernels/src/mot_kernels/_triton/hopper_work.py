"""How programs of the Hopper kernel find their units; see `hopper.py` for the rest.

All warps of a program walk the same units in the same order, each by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _first_unit(num_cut, parts):
    """Where a program's walk begins: below 0 if it has a part of a cut unit to do first."""
    program = gl.program_id(0)
    if program < num_cut * parts:
        program -= gl.num_programs(0)
    return program


@gluon.jit
def _extent(unit, num_whole, parts, steps):
    """Index of a unit, and its first and last k step for this program."""
    index = unit
    first_step = 0
    last_step = steps
    if unit < 0:
        index = num_whole + gl.program_id(0) // parts
        part = gl.program_id(0) % parts
        first_step = part * steps // parts
        last_step = (part + 1) * steps // parts
    return index, first_step, last_step


@gluon.jit
def _place(index, num_tiles, num_n, group_m):
    """Unit -> (row tile, column block): group_m row tiles walk the columns together."""
    group = index // (group_m * num_n)
    first = group * group_m
    rows = min(num_tiles - first, group_m)
    within = index % (group_m * num_n)
    return first + within % rows, within // rows
