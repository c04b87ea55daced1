drop table saga.stray_replies;
drop table saga.commands;
