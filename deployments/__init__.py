"""The Ray Serve applications that serve `acestep`: router, planner pools, renderer pools."""
