"""The `modelcache` command: the life cycle of a ModelCache on one machine, and looking into its volume.

Every command is one module of `commands`. Modules import what a command needs only when it runs, so that
`modelcache --help` and `modelcache wait` work with the base dependencies alone.
"""
