"""The TTT unroll with its alignment, the objectives, and acceptance as the engines define it."""
