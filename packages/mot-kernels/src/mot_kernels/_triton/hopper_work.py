"""How programs of the Hopper kernel find their units; see `hopper.py` for the rest.

All warps of a program walk the same units in the same order, each by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _walk(program, programs, work):
    """A program's first unit, the stride to its next one, and the end of its walk.

    The first is below 0 if it has a part of a cut unit to do before all else. The last of the
    programs, from `own` on, have the units of the side tiles, and those alone.
    """
    num_tiles, side_tiles, own, num_n, num_whole, parts, steps, group_m = work
    units = num_tiles * num_n
    unit = program
    stride = own
    end = num_whole
    if program >= own:
        unit += units - own
        stride = programs - own
        end = units + side_tiles * num_n
    elif program < (units - num_whole) * parts:
        unit -= own
    return unit, stride, end


@gluon.jit
def _extent(unit, program, work):
    """Index of a unit, and its first and last k step for this program."""
    num_tiles, side_tiles, own, num_n, num_whole, parts, steps, group_m = work
    index = unit
    first_step = 0
    last_step = steps
    if unit < 0:
        index = num_whole + program // parts
        part = program % parts
        first_step = part * steps // parts
        last_step = (part + 1) * steps // parts
    return index, first_step, last_step


@gluon.jit
def _place(index, work):
    """Unit -> (row tile, column block): group_m row tiles walk the columns together."""
    num_tiles, side_tiles, own, num_n, num_whole, parts, steps, group_m = work
    base = 0
    count = num_tiles
    if index >= num_tiles * num_n:
        base = num_tiles
        count = side_tiles
        index -= num_tiles * num_n
    group = index // (group_m * num_n)
    first = group * group_m
    rows = min(count - first, group_m)
    within = index % (group_m * num_n)
    return base + first + within % rows, within // rows
