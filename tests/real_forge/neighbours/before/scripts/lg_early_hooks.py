"""Neighbours that replace a function before lora-guard's scripts are run."""

import lg_neighbours

if lg_neighbours.wanted("state_dict@before"):
    lg_neighbours.half_the_factors("state_dict@before")
