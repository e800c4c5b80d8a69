"""How programs of the Hopper kernel find their units; see `hopper.py` for the rest.

All warps of a program walk the same units in the same order, each by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _first_unit(work):
    """Where a program's walk begins: below 0 if it has parts of cut units to do first."""
    num_tiles, num_n, num_whole, parts, _steps, _group_m, _head, tails = work
    program = gl.program_id(0)
    num_cut = num_tiles * num_n - num_whole
    if tails > 0:
        program -= _own_tails(num_cut, tails) * gl.num_programs(0)
    elif program < num_cut * parts:
        program -= gl.num_programs(0)
    return program


@gluon.jit
def _end_of_walk(work):
    """Heads of cut units are at the end of it."""
    num_tiles, num_n, num_whole, _parts, _steps, _group_m, _head, tails = work
    end = num_whole
    if tails > 0:
        end = num_tiles * num_n
    return end


@gluon.jit
def _extent(unit, work):
    """Index of a unit, its first and last k step for this program, and what part that is.

    Whether it is one of equal parts, a tail, a head (`deal`).
    """
    num_tiles, num_n, num_whole, parts, steps, _group_m, head, tails = work
    index = unit
    first_step = 0
    last_step = steps
    is_tail = (tails > 0) & (unit < 0)
    is_head = (tails > 0) & (unit >= num_whole)
    if is_tail:
        num_cut = num_tiles * num_n - num_whole
        left = (gl.program_id(0) - unit) // gl.num_programs(0)
        first = (gl.program_id(0) - num_cut) * tails
        index = num_whole + first + _own_tails(num_cut, tails) - left
        first_step = head
    elif is_head:
        last_step = head
    elif unit < 0:
        index = num_whole + gl.program_id(0) // parts
        part = gl.program_id(0) % parts
        first_step = part * steps // parts
        last_step = (part + 1) * steps // parts
    return index, first_step, last_step, (tails == 0) & (unit < 0), is_tail, is_head


@gluon.jit
def _own_tails(num_cut, tails):
    """How many tails a program has: up to `tails`, those behind the heads' programs."""
    left = num_cut - (gl.program_id(0) - num_cut) * tails
    own = min(max(left, 0), tails)
    if gl.program_id(0) < num_cut:
        own = 0
    return own


@gluon.jit
def _place(index, num_tiles, num_n, group_m):
    """Unit -> (row tile, column block): group_m row tiles walk the columns together."""
    group = index // (group_m * num_n)
    first = group * group_m
    rows = min(num_tiles - first, group_m)
    within = index % (group_m * num_n)
    return first + within % rows, within // rows
