from quick_cards import template_of_cards_is_compiled_once  # noqa: F401
