"""Claims that are functions of a module of their own fail with the values they compare, as those of tests do."""

import pytest

pytest.register_assert_rewrite("contract", "golden")
