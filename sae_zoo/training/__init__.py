"""How training moves: the recipe, schedules, and L0 control, as pure functions of the step and of what was measured."""
