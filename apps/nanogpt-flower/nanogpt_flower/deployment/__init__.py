"""Deploy the app among parties on several machines: their credentials, and a party's SuperNode."""
