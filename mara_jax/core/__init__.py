"""The papers' equations as pure functions on arrays; nothing here imports anything else of this package."""
