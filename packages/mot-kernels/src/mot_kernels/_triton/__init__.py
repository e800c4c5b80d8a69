"""The only place with `@triton.jit`."""
