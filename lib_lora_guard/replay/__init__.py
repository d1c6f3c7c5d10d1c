"""The configurations that users reported, calculated again. A check of the plan and a document; Forge runs none of it."""
