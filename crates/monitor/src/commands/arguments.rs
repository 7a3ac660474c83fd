//! Arguments by name, once they are checked: a value that is not there and one of another type are the same then.

use serde_json::{Map, Value};

/// An object whose members have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Arguments<'a> {
    pub(crate) fn text(self, name: &str) -> Option<&'a str> {
        self.0.get(name).and_then(Value::as_str)
    }

    pub(crate) fn has(self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A required one.
    pub(crate) fn required(self, name: &str) -> &'a str {
        self.text(name).unwrap_or_default()
    }

    pub(crate) fn is_true(self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(crate) fn integer(self, name: &str) -> Option<&'a Value> {
        self.0.get(name)
    }

    pub(crate) fn list(self, name: &str) -> &'a [Value] {
        self.0.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn object(self, name: &str) -> Option<Arguments<'a>> {
        self.0.get(name).and_then(Value::as_object).map(Arguments)
    }
}
