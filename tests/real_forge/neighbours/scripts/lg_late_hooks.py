"""Neighbours that replace a function after lora-guard's scripts were run, and what all of them did."""

import lg_neighbours
from modules import script_callbacks

if lg_neighbours.wanted("force_refresh@after"):
    lg_neighbours.wrap_refresh("force_refresh@after", force=True)
if lg_neighbours.wanted("state_dict@after"):
    lg_neighbours.half_the_factors("state_dict@after")


def routes(demo, app):
    app.add_api_route("/lora-guard-test/neighbours", lambda: dict(lg_neighbours.work()), methods=["GET"])


script_callbacks.on_app_started(routes)
