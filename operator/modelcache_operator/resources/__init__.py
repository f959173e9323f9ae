"""Pure builders of the objects a ModelCache owns; nothing in here talks to a cluster."""
