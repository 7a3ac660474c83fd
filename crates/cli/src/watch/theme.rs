//! The screen's colours: a blue and an orange, which people who see few colours tell apart too and which stand out from
//! dark and light backgrounds alike. Nothing is told by colour alone.

use ratatui::style::{Color, Modifier, Style};

/// Whether there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    Colours,
    Plain,
}

impl Theme {
    /// As `NO_COLOR` asks: <https://no-color.org>.
    pub fn from_environment() -> Self {
        if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) { Self::Plain } else { Self::Colours }
    }

    fn colour(self, index: u8) -> Style {
        match self {
            Self::Colours => Style::new().fg(Color::Indexed(index)),
            Self::Plain => Style::new(),
        }
    }

    /// What the migration does.
    pub fn first(self) -> Style {
        self.colour(33)
    }

    /// What stands against it: what the guest does, and limits.
    pub fn second(self) -> Style {
        self.colour(172)
    }

    /// What went wrong.
    pub fn alarm(self) -> Style {
        self.colour(172).add_modifier(Modifier::BOLD)
    }

    /// What frames the rest.
    pub fn faint(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// What is read first.
    pub fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// The line at the top.
    pub fn title(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }
}
