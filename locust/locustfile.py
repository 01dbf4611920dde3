"""The scenarios: edit the classes below. Every Locust process (master and workers) needs this file
and loadmanager_hooks.py beside it.

Try it alone: locust -f locustfile.py --host http://your-target-app.com
"""

import random

import loadmanager_hooks  # noqa: F401 - connects this Locust to Load Manager

from locust import HttpUser, between, task


class Visitor(HttpUser):
    """Looks around: three visitors for every editor."""

    weight = 3
    wait_time = between(1, 3)  # seconds between two tasks of one user

    @task(1)
    def open_home(self):
        self.client.get("/")

    @task(3)
    def browse_items(self):
        self.client.get("/api/items")

    @task(2)
    def open_item(self):
        # One name for all ids: else every id becomes a row of its own in the statistics.
        self.client.get(f"/api/items/{random.randint(1, 1000)}", name="/api/items/{id}")


class Editor(HttpUser):
    """Adds items, and looks at the list after that."""

    weight = 1
    wait_time = between(2, 5)

    @task
    def add_item(self):
        item = {"name": f"item {random.randint(1, 1000)}", "quantity": 1}
        with self.client.post("/api/items", json=item, catch_response=True) as response:
            # What counts as a failure is yours to say; without this, any status from 400 up.
            if response.status_code not in (200, 201):
                response.failure(f"item not added: HTTP {response.status_code}")
        self.client.get("/api/items")
