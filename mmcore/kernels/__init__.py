"""Operations of the model that decide its speed.

Each folder `<op>/` holds one public function in `__init__.py` (shapes, dtypes, equation), the definition of
right in `reference.py`, and faster forms beside it. `dispatch.py` chooses between them.
"""
