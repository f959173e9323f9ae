"""The ModelCache operator: level-triggered, kopf only watches, every decision is a pure function of what was read."""
