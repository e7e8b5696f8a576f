class HubMixin:
    pass
